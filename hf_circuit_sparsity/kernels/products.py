"""Products with matrices of few nonzeros."""

import ctypes
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .calling import LANES, Library, Shared, as_rows, declare, pieces

# As in products.c, where vectors are widest.
_BLOCK = 1024
_PANEL = 128
_TOKENS = 64


@dataclass
class NonzeroList:
    """The nonzeros of a matrix as `product` of products.c wants them, in blocks of columns.

    Attributes:
        rows, width: of the matrix.
        starts: `(blocks, rows + 1)` int64.
        columns: uint16, from the beginning of the block; what no start points to is not one.
        values: float32, beside the columns.
    """

    rows: int
    width: int
    starts: np.ndarray
    columns: np.ndarray
    values: np.ndarray

    @property
    def count(self) -> int:
        """How many nonzeros there are."""
        return int((self.starts[:, -1] - self.starts[:, 0]).sum())


class ProductKernels(Library):
    """Kernels of products.c."""

    def __init__(self, library: ctypes.CDLL):
        super().__init__(library)
        self._list_nonzeros = Shared(library, "list_nonzeros")
        self._product = Shared(library, "product")
        self._compress = declare(library.compress, "piiiippp", ctypes.c_int64)
        self._transpose_pattern = declare(library.transpose_pattern, "ppiipppp")
        self._sparse_linear = Shared(library, "sparse_linear")
        self._turn_pieces = Shared(library, "turn_pieces")
        self._gradient_at = Shared(library, "gradient_at")

    def list_nonzeros(
        self, a: Tensor, max_density: float, transpose: bool = False
    ) -> NonzeroList | None:
        """The nonzeros of a matrix or of its transpose; None if they are more than `max_density`.

        Args:
            a: `(rows, width)`.
        """
        a = as_rows(a)
        # A look at a few rows mostly settles it, without the pass over all.
        if (a[:: max(1, len(a) // 8)] != 0).float().mean() > 1.5 * max_density:
            return None
        rows, width = a.shape[::-1] if transpose else a.shape
        room = int(max_density * a.numel())
        starts = np.empty((-(-width // _BLOCK), rows + 1), np.int64)
        parts = pieces(len(starts), 1)
        # Every thread has a region of its own; what is not written costs no memory.
        space = (room if len(parts) < 2 else a.numel()) + LANES * max(1, len(parts))
        columns, values = np.empty(space, np.uint16), np.empty(space, np.float32)

        scratch = torch.empty(len(parts), LANES * _BLOCK)

        def arguments(number: int, blocks: range) -> tuple[int, ...]:
            first, stop = blocks.start * _BLOCK, min(blocks.stop * _BLOCK, width)
            base = rows * first + LANES * number
            return (
                a.data_ptr() + 4 * first * (a.stride(0) if transpose else 1), a.stride(0), rows,
                stop - first, int(transpose), min(room, rows * (stop - first)), base,
                starts.ctypes.data + blocks.start * starts.strides[0],
                columns.ctypes.data + 2 * base, values.ctypes.data + 4 * base,
                scratch[number].data_ptr(), 0,
            )  # fmt: skip

        called = [arguments(number, blocks) for number, blocks in enumerate(parts)]
        found = [int(of[-1]) for of in self._list_nonzeros(called)]
        if min(found, default=0) < 0 or sum(found) > room:
            return None
        return NonzeroList(rows, width, starts, columns, values)

    def product(self, a: NonzeroList, b: Tensor, transpose: bool = False) -> Tensor:
        """`a @ b`, or `a @ b.T`, at the cost of the nonzeros of `a`.

        Args:
            b: `(a.width, n)`, or with `transpose` `(n, a.width)`.

        Returns:
            `(a.rows, n)`.
        """
        b = as_rows(b)
        n = b.shape[0] if transpose else b.shape[1]
        out = torch.empty(a.rows, n)

        parts = pieces(n, _PANEL)
        scratch = torch.empty(len(parts), _BLOCK * _PANEL)  # on cache lines, unlike numpy's
        self._product([
            (
                a.starts.ctypes.data, a.columns.ctypes.data, a.values.ctypes.data, a.rows, a.width,
                b.data_ptr(), b.stride(0), int(transpose), columns.start, columns.stop,
                own.data_ptr(), out.data_ptr(), n,
            )
            for columns, own in zip(parts, scratch, strict=True)
        ])  # fmt: skip
        return out

    def nonzeros(
        self, weight: Tensor, room: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """The nonzeros of a matrix row by row; None if they are more than `room`.

        Args:
            weight: `(rows, width)`.

        Returns:
            `row_starts`, `(rows + 1,)` int32, `columns`, int32, and `values`, `(nonzeros,)`.
        """
        weight = as_rows(weight)
        rows, width = weight.shape
        room = int(torch.count_nonzero(weight)) if room is None else room
        starts = torch.empty(rows + 1, dtype=torch.int32)
        columns = torch.empty(room + 2 * LANES, dtype=torch.int32)
        values = torch.empty(room + 2 * LANES)
        n = self._compress(
            weight.data_ptr(), weight.stride(0), rows, width, room,
            starts.data_ptr(), columns.data_ptr(), values.data_ptr(),
        )  # fmt: skip
        return None if n < 0 else (starts, columns[:n], values[:n])

    def transpose_pattern(
        self, row_starts: Tensor, columns: Tensor, width: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`row_starts` and `columns` of the transposed matrix, and which nonzero each is.

        Args:
            row_starts: `(rows + 1,)` int32.
            columns: `(nonzeros,)` int32, below `width`.
        """
        row_starts, columns = row_starts.contiguous(), columns.contiguous()
        starts = torch.empty(width + 1, dtype=torch.int32)
        turned, order = torch.empty_like(columns), torch.empty_like(columns)
        scratch = torch.empty(width, dtype=torch.int32)
        self._transpose_pattern(
            row_starts.data_ptr(), columns.data_ptr(), len(row_starts) - 1, width,
            scratch.data_ptr(), starts.data_ptr(), turned.data_ptr(), order.data_ptr(),
        )  # fmt: skip
        return starts, turned, order

    def sparse_linear(
        self,
        x: Tensor,
        row_starts: Tensor,
        columns: Tensor,
        values: Tensor,
        rows: int,
        bias: Tensor | None,
    ) -> Tensor:
        """`x @ weight.T + bias` for a weight in compressed rows; see `CSR.linear`."""
        x = as_rows(x)
        tokens, width = x.shape
        out = torch.empty(tokens, rows)
        row_starts, columns, values = (
            t.detach().contiguous() for t in (row_starts, columns, values)
        )
        bias = None if bias is None else bias.detach().contiguous()

        parts = pieces(tokens, 2 * LANES)
        scratch = torch.empty(len(parts), (width + LANES) * 2 * LANES)
        self._sparse_linear([
            (
                row_starts.data_ptr(), columns.data_ptr(), values.data_ptr(), rows, width,
                0 if bias is None else bias.data_ptr(), x.data_ptr(), x.stride(0), part.start,
                part.stop, own.data_ptr(), out.data_ptr(), rows,
            )
            for part, own in zip(parts, scratch, strict=True)
        ])  # fmt: skip
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

        self._gradient_at([
            (
                row_starts.data_ptr(), columns.data_ptr(), grad.shape[1], x.shape[1],
                turned_grad.data_ptr(), turned_x.data_ptr(), len(x), rows.start, rows.stop,
                out.data_ptr(),
            )
            for rows in pieces(grad.shape[1], 64)
        ])  # fmt: skip
        return out

    def _turned(self, a: Tensor) -> Tensor:
        """`(tokens, width)` as `(tokens / 64, width, 64)`, padded with zeros."""
        a = as_rows(a)
        tokens, width = a.shape
        out = torch.empty(-(-tokens // _TOKENS), width, _TOKENS)

        self._turn_pieces([
            (
                a.data_ptr(), a.stride(0), tokens, columns.start, columns.stop, width,
                out.data_ptr(),
            )
            for columns in pieces(width, 256)
        ])  # fmt: skip
        return out
