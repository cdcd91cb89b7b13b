"""AbsTopK, and the passes of the magnitude projection."""

import ctypes
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .calling import (
    LANES,
    PIECE,
    Library,
    Shared,
    as_rows,
    declare,
    map_pieces,
    pieces,
    takes,
)  # fmt: skip

_WORD = 16  # bits, as in selection.c


class SelectionKernels(Library):
    """Kernels of selection.c."""

    def __init__(self, library: ctypes.CDLL):
        super().__init__(library)
        self._abs_topk = Shared(library, "abs_topk")
        self._masked = Shared(library, "masked")
        self._list_range = declare(library.list_range, "piiuuiipppp", ctypes.c_int64)
        self._zero_below = Shared(library, "zero_below")
        self._pack = declare(library.pack, "ppipp", ctypes.c_int64)
        self._unpack = declare(library.unpack, "ppip", ctypes.c_int64)

    def differentiable_abs_topk(self, x: Tensor, k: int) -> Tensor:
        """The first of what [`SelectionKernels.abs_topk`] returns, with a gradient."""
        if torch.is_grad_enabled() and x.requires_grad:
            return _AbsTopK.apply(x, k, self)
        return self.abs_topk(x, k, want_mask=False)[0]

    def abs_topk(self, x: Tensor, k: int, want_mask: bool) -> tuple[Tensor, Tensor | None]:
        """The k largest magnitudes of every row, zeros elsewhere, and a bool mask of them.

        Args:
            x: `(..., width)`.
            k: 1 ≤ k < width.
        """
        width = x.shape[-1]
        flat = as_rows(x)
        out = torch.empty(x.shape)
        mask = torch.empty(x.shape, dtype=torch.bool) if want_mask else None

        self._abs_topk([
            (
                flat.data_ptr() + 4 * rows.start * flat.stride(0), flat.stride(0), len(rows), width,
                k, out.data_ptr() + 4 * rows.start * width, width,
                0 if mask is None else mask.data_ptr() + rows.start * width,
            )
            for rows in pieces(len(flat), max(1, PIECE // width))
        ])  # fmt: skip
        return out, mask

    def masked(self, x: Tensor, mask: Tensor) -> Tensor:
        """`x` where the bool `mask` of its shape is true, else 0."""
        if (x.requires_grad and torch.is_grad_enabled()) or not takes(x):
            return torch.where(mask, x, 0)
        x = x.contiguous()
        out = torch.empty(x.shape)

        self._masked([
            (
                x.data_ptr() + 4 * piece.start, mask.data_ptr() + piece.start, len(piece),
                out.data_ptr() + 4 * piece.start,
            )
            for piece in pieces(x.numel(), PIECE)
        ])  # fmt: skip
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
        at, magnitude = np.empty(n + LANES, np.int64), np.empty(n + LANES, np.int32)
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
        self._zero_below([
            (x.data_ptr() + 4 * piece.start, len(piece), threshold)
            for piece in pieces(x.numel(), PIECE)
        ])  # fmt: skip

    def pack(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """A bit per entry, uint8 `(entries / 8,)`, lowest first, and the entries that have one.

        Args:
            x: `(n,)`.
            mask: bool `(n,)`; the nonzeros if not given.
        """
        x, n = x.detach().contiguous(), x.numel()
        words = torch.empty(-(-n // _WORD), dtype=torch.int16)
        mask = None if mask is None else mask.contiguous()

        def work(piece: range) -> Tensor:
            start = piece.start
            values = torch.empty(len(piece) + LANES)
            taken = self._pack(
                x.data_ptr() + 4 * start, None if mask is None else mask.data_ptr() + start,
                len(piece), words.data_ptr() + start // _WORD * 2, values.data_ptr(),
            )  # fmt: skip
            return values[:taken].clone()

        parts = map_pieces(work, pieces(n, PIECE))
        values = parts[0] if len(parts) == 1 else torch.cat([x[:0], *parts])
        return words.view(torch.uint8)[: -(-n // 8)], values

    def unpack(self, bits: Tensor, values: Tensor, n: int) -> Tensor:
        """The vector of `n` entries whose nonzeros [`pack`] took."""
        out, words = torch.empty(n), np.zeros(2 * -(-n // _WORD), np.uint8)
        words[: len(bits)] = bits.numpy()
        ranges = pieces(n, PIECE)
        counts = [_ONES[words[r.start // 8 : -(-r.stop // 8)]].sum(dtype=np.int64) for r in ranges]
        if sum(counts) != len(values):
            raise ValueError(f"{sum(counts)} bits were passed for {len(values)} values.")
        starts = dict(zip(ranges, np.cumsum([0, *counts]).tolist(), strict=False))

        def work(piece: range) -> None:
            self._unpack(
                words.ctypes.data + piece.start // 8, values.data_ptr() + 4 * starts[piece],
                len(piece), out.data_ptr() + 4 * piece.start,
            )  # fmt: skip

        map_pieces(work, ranges)
        return out


# How many bits of a byte are set.
_ONES = np.array([byte.bit_count() for byte in range(256)], np.uint8)


class _AbsTopK(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, k: int, kernels: Any) -> Tensor:
        ctx.kernels = kernels
        out, mask = kernels.abs_topk(x, k, want_mask=True)
        ctx.save_for_backward(mask)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (mask,) = ctx.saved_tensors
        return ctx.kernels.masked(grad, mask), None, None
