"""The compiled kernels as functions of tensors, their work split among torch's threads.

All take and give float32 tensors on the CPU without gradient; `modeling/` and `trainer/` put them
into autograd. The plain paths they are held against are the ones used without them.
"""

import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..modeling.worker_threads import map_pieces
from .compile import build

# As in kernels.c.
_LANES = 16
_BLOCK = 1024
_PANEL = 128
_TOKENS = 64
_QUERIES = 4
# Channels that a head may have.
ATTENTION_WIDTHS = (_LANES, 2 * _LANES, 4 * _LANES)
# Entries worth a thread of their own.
_PIECE = 1 << 16

_POINTER, _INT, _FLAG = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int


@dataclass
class NonzeroList:
    """The nonzeros of a matrix as `product` of kernels.c wants them, in blocks of columns.

    Attributes:
        rows, width: of the matrix.
        starts: `(blocks, rows + 1)` int64.
        columns: `(nonzeros,)` uint16, from the beginning of the block.
        values: `(nonzeros,)` float32.
    """

    rows: int
    width: int
    starts: np.ndarray
    columns: np.ndarray
    values: np.ndarray


@dataclass
class CompressedRows:
    """The nonzeros of a matrix row by row (CSR).

    Attributes:
        row_starts: `(rows + 1,)` int32.
        columns: `(nonzeros,)` int32.
        values: `(nonzeros,)` float32.
        width: columns of the matrix.
    """

    row_starts: Tensor
    columns: Tensor
    values: Tensor
    width: int


class CpuKernels:
    """See the module; `load_kernels` makes the one instance."""

    def __init__(self, library: ctypes.CDLL):
        self._abs_topk = _declare(library.abs_topk, "piiiipp")
        self._masked = _declare(library.masked, "ppip")
        self._list_range = _declare(library.list_range, "piiuuiipppp", _INT)
        self._zero_below = _declare(library.zero_below, "piu")
        self._list_nonzeros = _declare(library.list_nonzeros, "piiifipppp", _INT)
        self._product = _declare(library.product, "pppiipifiippi")
        self._compress = _declare(library.compress, "piiiippp", _INT)
        self._transpose_compressed = _declare(library.transpose_compressed, "pppiipppp")
        self._sparse_linear = _declare(library.sparse_linear, "pppiippiiippi")
        self._attend = _declare(library.attend, "pppiiidpiippp")
        self._attend_back = _declare(library.attend_back, "ppppppiiidpiippppp")
        self._turn_pieces = _declare(library.turn_pieces, "piiiiip")
        self._gradient_at = _declare(library.gradient_at, "ppiippiiip")

    def abs_topk(self, x: Tensor, k: int, want_mask: bool) -> tuple[Tensor, Tensor | None]:
        """The k largest magnitudes of every row, zeros elsewhere, and a bool mask of them.

        Args:
            x: `(..., width)`.
            k: 1 ≤ k < width.
        """
        width = x.shape[-1]
        flat = _rows(x)
        out = torch.empty(x.shape)
        mask = torch.empty(x.shape, dtype=torch.bool) if want_mask else None

        def work(rows: range) -> None:
            start, n = rows.start, len(rows)
            self._abs_topk(
                flat.data_ptr() + 4 * start * flat.stride(0),
                flat.stride(0),
                n,
                width,
                k,
                out.data_ptr() + 4 * start * width,
                None if mask is None else mask.data_ptr() + start * width,
            )

        _in_pieces(work, len(flat), max(1, _PIECE // width))
        return out, mask

    def masked(self, x: Tensor, mask: Tensor) -> Tensor:
        """`x` where the bool `mask` of its shape is true, else 0."""
        x = x.contiguous()
        out = torch.empty(x.shape)

        def work(piece: range) -> None:
            start = piece.start
            self._masked(
                x.data_ptr() + 4 * start,
                mask.data_ptr() + start,
                len(piece),
                out.data_ptr() + 4 * start,
            )

        _in_pieces(work, x.numel(), _PIECE)
        return out

    def list_range(
        self, bits: np.ndarray, width: int, low: int, high: int, first: int, count_rows: bool
    ) -> tuple[np.ndarray, np.ndarray, int, np.ndarray | None]:
        """Entries whose magnitude is in [low, high).

        Args:
            bits: `(n,)` int32, bit patterns of floats; contiguous, n a multiple of `width`.
            width: entries in a row.
            low, high: bit patterns of magnitudes, up to that of infinity.
            first: what to count positions from.
            count_rows: also count the entries at or above `high` of each row.

        Returns:
            positions (int64) and magnitudes (int32) of the entries, ascending; how many others are
            at or above `high`, altogether and by row.

        Raises:
            FloatingPointError: with the position, counted from 0, of an entry that is not finite.
        """
        n = len(bits)
        at, magnitude = np.empty(n + _LANES, np.int64), np.empty(n + _LANES, np.int32)
        above = ctypes.c_int64()
        by_row = np.empty(n // width, np.int64) if count_rows else None
        listed = self._list_range(
            bits.ctypes.data, n, width, low, high, first, n, at.ctypes.data, magnitude.ctypes.data,
            ctypes.addressof(above), None if by_row is None else by_row.ctypes.data,
        )  # fmt: skip
        if listed < 0:
            raise FloatingPointError(-2 - listed)
        return at[:listed].copy(), magnitude[:listed].copy(), above.value, by_row

    def zero_below(self, x: Tensor, threshold: int) -> None:
        """Zero, in place, what is smaller in magnitude than the float of this bit pattern."""
        n = x.numel()

        def work(piece: range) -> None:
            self._zero_below(x.data_ptr() + 4 * piece.start, len(piece), threshold)

        _in_pieces(work, n, _PIECE)

    def list_nonzeros(
        self, a: Tensor, max_density: float, transpose: bool = False
    ) -> NonzeroList | None:
        """The nonzeros of a matrix or of its transpose; None if they are more than `max_density`.

        Args:
            a: `(rows, width)`.
        """
        a = _rows(a)
        # A look at a few rows mostly settles it, without the pass over all.
        if (a[:: max(1, len(a) // 8)] != 0).float().mean() > 1.5 * max_density:
            return None
        rows, width = a.shape[::-1] if transpose else a.shape
        room = int(max_density * a.numel())
        columns = np.empty(room + _LANES, np.uint16)
        values = np.empty(room + _LANES, np.float32)
        starts = np.empty((-(-width // _BLOCK), rows + 1), np.int64)
        scratch = torch.empty(_LANES * _BLOCK)
        n = self._list_nonzeros(
            a.data_ptr(), a.stride(0), rows, width, int(transpose), room,
            starts.ctypes.data, columns.ctypes.data, values.ctypes.data, scratch.data_ptr(),
        )  # fmt: skip
        return None if n < 0 else NonzeroList(rows, width, starts, columns[:n], values[:n])

    def product(self, a: NonzeroList, b: Tensor, transpose: bool = False) -> Tensor:
        """`a @ b`, or `a @ b.T`, at the cost of the nonzeros of `a`.

        Args:
            b: `(a.width, n)`, or with `transpose` `(n, a.width)`.

        Returns:
            `(a.rows, n)`.
        """
        b = _rows(b)
        n = b.shape[0] if transpose else b.shape[1]
        out = torch.empty(a.rows, n)

        def work(columns: range) -> None:
            scratch = torch.empty(_BLOCK * _PANEL)  # on cache lines, as numpy would not have it
            self._product(
                a.starts.ctypes.data, a.columns.ctypes.data, a.values.ctypes.data,
                a.rows, a.width, b.data_ptr(), b.stride(0), int(transpose),
                columns.start, columns.stop, scratch.data_ptr(), out.data_ptr(), n,
            )  # fmt: skip

        _in_pieces(work, n, _PANEL)
        return out

    def compress(self, weight: Tensor, max_density: float) -> CompressedRows | None:
        """The nonzeros of a matrix row by row; None if they are more than `max_density`.

        Args:
            weight: `(rows, width)`.
        """
        weight = _rows(weight)
        rows, width = weight.shape
        room = int(max_density * weight.numel())
        starts = torch.empty(rows + 1, dtype=torch.int32)
        columns = torch.empty(room + 2 * _LANES, dtype=torch.int32)
        values = torch.empty(room + 2 * _LANES)
        n = self._compress(
            weight.data_ptr(), weight.stride(0), rows, width, room,
            starts.data_ptr(), columns.data_ptr(), values.data_ptr(),
        )  # fmt: skip
        return None if n < 0 else CompressedRows(starts, columns[:n], values[:n], width)

    def transpose(self, a: CompressedRows) -> CompressedRows:
        """The nonzeros of the transposed matrix row by row."""
        rows = len(a.row_starts) - 1
        starts = torch.empty(a.width + 1, dtype=torch.int32)
        columns, values = torch.empty_like(a.columns), torch.empty_like(a.values)
        scratch = torch.empty(a.width, dtype=torch.int32)
        self._transpose_compressed(
            a.row_starts.data_ptr(), a.columns.data_ptr(), a.values.data_ptr(), rows, a.width,
            scratch.data_ptr(), starts.data_ptr(), columns.data_ptr(), values.data_ptr(),
        )  # fmt: skip
        return CompressedRows(starts, columns, values, rows)

    def sparse_linear(
        self,
        x: Tensor,
        row_starts: Tensor,
        columns: Tensor,
        values: Tensor,
        rows: int,
        bias: Tensor | None,
    ) -> Tensor:
        """`x @ weight.T + bias` for a weight in compressed rows; see `sparse_matmul`."""
        x = _rows(x)
        tokens, width = x.shape
        out = torch.empty(tokens, rows)
        row_starts, columns, values = (
            t.detach().contiguous() for t in (row_starts, columns, values)
        )
        bias = None if bias is None else bias.detach().contiguous()

        def work(piece: range) -> None:
            scratch = torch.empty((width + _LANES) * _LANES)
            self._sparse_linear(
                row_starts.data_ptr(), columns.data_ptr(), values.data_ptr(), rows, width,
                None if bias is None else bias.data_ptr(), x.data_ptr(), x.stride(0),
                piece.start, piece.stop, scratch.data_ptr(), out.data_ptr(), rows,
            )  # fmt: skip

        _in_pieces(work, tokens, _LANES)
        return out

    def gradient_at(self, row_starts: Tensor, columns: Tensor, grad: Tensor, x: Tensor) -> Tensor:
        """`grad.T @ x` at the given places only: the gradient of a sparse weight.

        Args:
            row_starts: `(rows + 1,)` int32.
            columns: `(nonzeros,)` int32.
            grad: `(tokens, rows)`.
            x: `(tokens, width)`.

        Returns:
            `(nonzeros,)`.
        """
        turned_grad, turned_x = self._turned(grad), self._turned(x)
        row_starts, columns = row_starts.contiguous(), columns.contiguous()
        out = torch.empty(len(columns))

        def work(rows: range) -> None:
            self._gradient_at(
                row_starts.data_ptr(), columns.data_ptr(), grad.shape[1], x.shape[1],
                turned_grad.data_ptr(), turned_x.data_ptr(), len(x),
                rows.start, rows.stop, out.data_ptr(),
            )  # fmt: skip

        _in_pieces(work, grad.shape[1], 64)
        return out

    def can_attend(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """Whether `attend` takes them: in shape, and in how they lie in memory."""
        return (
            query.shape[2] > 1
            and query.shape[3] in ATTENTION_WIDTHS
            and all(x.stride(3) == 1 and x.shape == query.shape for x in (query, key, value))
        )

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, sink: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Causal attention with a sink.

        Args:
            query, key, value: `(B, H, T, K)`, K one of `ATTENTION_WIDTHS`.
            sink: `(H,)`, a logit that only enters the softmax denominator.
            scale: of the scores.

        Returns:
            `(B, H, T, K)`, which lies as `(B, T, H, K)`, and the logarithm of the softmax
            denominator with the sink, `(B, H, T)`.
        """
        batch, heads, tokens, width = query.shape
        out = torch.empty(batch, tokens, heads, width).transpose(1, 2)
        log_sum = torch.empty(batch, heads, tokens)
        sink = sink.detach().contiguous()
        places = [_Heads.of(x) for x in (query, key, value, out)]
        q, k, v, o = (ctypes.addressof(place) for place in places)

        def work(part: range) -> None:
            scratch = torch.empty((2 * width + 1) * _round_up(tokens))
            self._attend(
                q, k, v, heads, tokens, width, scale, sink.data_ptr(), part.start, part.stop,
                o, log_sum.data_ptr(), scratch.data_ptr(),
            )  # fmt: skip

        _in_pieces(work, batch * heads, 1)
        return out, log_sum

    def attend_back(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sink: Tensor,
        scale: float,
        out: Tensor,
        log_sum: Tensor,
        grad: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The gradients of `attend` for query, key, value and sink, given that of its output."""
        batch, heads, tokens, width = query.shape
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        grads = [torch.empty(batch, tokens, heads, width).transpose(1, 2) for _ in range(3)]
        grad_sink = torch.empty(batch, heads)
        sink = sink.detach().contiguous()
        places = [_Heads.of(x) for x in (query, key, value, out, grad, *grads)]
        q, k, v, o, g, *of_grads = (ctypes.addressof(place) for place in places)

        def work(part: range) -> None:
            scratch = torch.empty((5 * width + 2 * _QUERIES) * _round_up(tokens))
            self._attend_back(
                q, k, v, o, g, log_sum.data_ptr(), heads, tokens, width, scale, sink.data_ptr(),
                part.start, part.stop, *of_grads, grad_sink.data_ptr(), scratch.data_ptr(),
            )  # fmt: skip

        _in_pieces(work, batch * heads, 1)
        return *grads, grad_sink.sum(0)

    def _turned(self, a: Tensor) -> Tensor:
        """`(tokens, width)` as `(tokens / 64, width, 64)`, padded with zeros."""
        a = _rows(a)
        tokens, width = a.shape
        out = torch.empty(-(-tokens // _TOKENS), width, _TOKENS)

        def work(columns: range) -> None:
            self._turn_pieces(
                a.data_ptr(), a.stride(0), tokens, columns.start, columns.stop, width,
                out.data_ptr(),
            )  # fmt: skip

        _in_pieces(work, width, 256)
        return out


@functools.cache
def load_kernels() -> CpuKernels | None:
    """The kernels; None where they cannot be compiled. The first call may compile for seconds."""
    library = build()
    return None if library is None else CpuKernels(library)


def _declare(function: Callable, arguments: str, result: type | None = None) -> Callable:
    """Say what a C function takes: pointers, integers, bit patterns, flags and decimals."""
    kinds = {"p": _POINTER, "i": _INT, "u": ctypes.c_uint32, "f": _FLAG, "d": ctypes.c_float}
    function.argtypes = [kinds[kind] for kind in arguments]
    function.restype = result
    return function


class _Heads(ctypes.Structure):
    """`struct heads` of kernels.c: where the matrices of sequences and heads are."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("sequence", ctypes.c_int64),
        ("head", ctypes.c_int64),
        ("token", ctypes.c_int64),
    ]

    @classmethod
    def of(cls, x: Tensor) -> "_Heads":
        """Of a tensor `(B, H, T, K)` whose channels lie next to each other."""
        return cls(x.data_ptr(), x.stride(0), x.stride(1), x.stride(2))


def _round_up(tokens: int) -> int:
    return -(-tokens // _LANES) * _LANES


def _rows(x: Tensor) -> Tensor:
    """`(..., width)` as a matrix whose rows are contiguous; they may lie apart."""
    x = x.detach()
    x = x[None] if x.dim() == 1 else x.flatten(0, -2)
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _in_pieces(work: Callable[[range], None], n: int, grain: int) -> None:
    """Call `work` on ranges that make up `range(n)`, one for each thread, cut at `grain`."""
    if n == 0:
        return
    threads = min(torch.get_num_threads(), -(-n // grain))
    step = -(-n // (threads * grain)) * grain
    map_pieces(work, [range(i, min(i + step, n)) for i in range(0, n, step)])


__all__ = ["CompressedRows", "CpuKernels", "NonzeroList", "load_kernels"]
