"""What random coordinate descent does with the nonzeros of a matrix: find, multiply, keep the best.

Positions are flat int64 indices into the matrix as stored, ascending, so that they are the pattern
of a CSR matrix as they stand.
"""

from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ...kernels.cpu import compiled_kernels
from ...kernels.products import CompressedRows
from ...modeling.sparse_layers import sampled_product, sparse_matmul, transposed
from ..sparse_compute import weight_gradient

# Entries of a dense product held at a time where there is no kernel for a sampled one.
_PIECE = 1 << 20


class LivePattern:
    """The live coordinates of a matrix as compressed rows, for products that cost only them.

    Args:
        live: flat positions, ascending, ``(n,)`` int64.
        shape: of the matrix as stored.
    """

    def __init__(self, live: Tensor, shape: tuple[int, int]) -> None:
        self.live = live
        self.shape = shape

    @cached_property
    def columns(self) -> Tensor:
        """``(n,)`` int32."""
        return (self.live % self.shape[1]).to(torch.int32)

    @cached_property
    def row_starts(self) -> Tensor:
        """``(rows + 1,)`` int32."""
        rows, width = self.shape
        first = torch.arange(rows + 1, device=self.live.device) * width
        return torch.searchsorted(self.live, first).to(torch.int32)

    @cached_property
    def transposed(self) -> tuple[Tensor, Tensor, Tensor]:
        """``row_starts``, ``columns`` and order of the values of the transposed matrix."""
        return transposed(self.row_starts, self.columns, self.shape[1])

    def product(self, x: Tensor, values: Tensor, transpose: bool = False) -> Tensor:
        """``x @ matrix.T``, or ``x @ matrix`` with ``transpose``.

        Args:
            x: ``(tokens, width)``, or ``(tokens, rows)`` with ``transpose``.
            values: at the live coordinates, ``(n,)``.
        """
        rows, width = self.shape
        if not transpose:
            return sparse_matmul(x, self.row_starts, self.columns, values, rows)
        if kernels := compiled_kernels(x, values):
            own = CompressedRows(self.row_starts, self.columns, values.detach(), width)
            turned = kernels.transpose(own)
            return sparse_matmul(x, turned.row_starts, turned.columns, turned.values, width)
        starts, columns, order = self.transposed
        return sparse_matmul(x, starts, columns, values[order], width)

    def sampled_product(self, left: Tensor, right: Tensor) -> Tensor:
        """``left.T @ right`` at the live coordinates only, ``(n,)`` in at least float32.

        Args:
            left: ``(tokens, rows)``.
            right: ``(tokens, width)``.
        """
        dtype = torch.promote_types(left.dtype, torch.float32)
        left, right = left.to(dtype), right.to(dtype)
        rows, width = self.shape
        # A sampled product costs many times a dense product's price per entry, the more so where
        # activations are few.
        kernels = compiled_kernels(left, right)
        dense = 8 if kernels is None else 20
        if len(self.live) * dense > rows * width or not _has_sampled_kernel(left):
            return self._product_in_pieces(left, right)
        return sampled_product(self.row_starts, self.columns, left, right)

    def _product_in_pieces(self, left: Tensor, right: Tensor) -> Tensor:
        """The same by dense products of a few rows at a time, read at the live coordinates."""
        rows, width = self.shape
        out = left.new_empty(len(self.live))
        step = max(1, _PIECE // max(1, width))
        for start in range(0, rows, step):
            stop = min(rows, start + step)
            first, last = int(self.row_starts[start]), int(self.row_starts[stop])
            if first < last:
                piece = weight_gradient(left[:, start:stop], right, compiled_kernels(left, right))
                out[first:last] = piece.flatten()[self.live[first:last] - start * width]
        return out


def _has_sampled_kernel(x: Tensor) -> bool:
    if x.device.type == "cpu":
        return torch.backends.mkl.is_available() or compiled_kernels(x) is not None
    return x.device.type == "cuda"


def places(mask: Tensor) -> Tensor:
    """Where a mask, ``(n,)``, is true, ascending."""
    if mask.device.type != "cpu":
        return mask.nonzero().flatten()
    # Where few are, numpy takes a tenth of the time.
    return torch.from_numpy(np.flatnonzero(mask.numpy()))


def keep_largest(
    values: Tensor, k: int, rows: Tensor | None = None, min_nonzeros: int = 0
) -> Tensor:
    """Which of the listed values are among the ``k`` largest magnitudes; :func:`project_topk_`.

    :func:`keep_largest_reference` says what that is, by sorting.

    Args:
        values: ``(n,)``; equal magnitudes are kept first come, first served.
        k: how many to keep.
        rows: the row of every value, ``(n,)``; needed with a row minimum.
        min_nonzeros: values that each row keeps in any case.

    Returns:
        ``(n,)`` bool. Values of zero are never kept.
    """
    if values.device.type != "cpu" or values.dtype not in (torch.float32, torch.float64):
        return keep_largest_reference(values, k, rows, min_nonzeros)
    magnitude = values.abs().numpy()
    kept = _largest(magnitude, k)
    if min_nonzeros and rows is not None:
        _pay_short_rows(magnitude, kept, rows, min_nonzeros)
    return torch.from_numpy(kept)


def keep_largest_reference(
    values: Tensor, k: int, rows: Tensor | None = None, min_nonzeros: int = 0
) -> Tensor:
    """:func:`keep_largest`, written plainly; also what runs on other devices."""
    magnitude = values.abs()
    safe = torch.zeros_like(values, dtype=torch.bool)
    if min_nonzeros and rows is not None:
        safe = (_rank_within_row(rows, values) < min_nonzeros) & (values != 0)
    order = torch.where(safe, torch.inf, magnitude).sort(descending=True, stable=True).indices
    kept = safe.clone()
    kept[order[: max(0, k)]] = True
    return kept & (values != 0)


def _largest(magnitude: np.ndarray, k: int) -> np.ndarray:
    """Mask of the ``k`` largest, the first of equals, without zeros."""
    n = magnitude.size
    if k >= n:
        return magnitude > 0
    if k <= 0:
        return np.zeros(n, bool)
    threshold = np.partition(magnitude, n - k)[n - k]
    kept = magnitude >= threshold if threshold > 0 else magnitude > 0
    surplus = np.count_nonzero(kept) - k
    if surplus > 0:  # of those that equal the threshold the last ones are too many
        kept[np.flatnonzero(magnitude == threshold)[-surplus:]] = False
    return kept


def _pay_short_rows(
    magnitude: np.ndarray, kept: np.ndarray, rows: Tensor, min_nonzeros: int
) -> None:
    """Give rows that come out short their own largest, at the cost of the smallest of the others.

    The smallest are taken where their row can spare them, so nothing but these and the rows that
    are short has to be sorted.
    """
    out = np.flatnonzero(~kept & (magnitude > 0))
    if not out.size:
        return
    row_of = rows.numpy()
    counts = np.bincount(row_of[kept], minlength=int(row_of.max()) + 1)
    out = out[counts[row_of[out]] < min_nonzeros]
    if not out.size:
        return
    owed = out[_place_in_row(row_of[out], -magnitude[out]) + counts[row_of[out]] < min_nonzeros]
    inside = np.flatnonzero(kept)
    sizes = magnitude[inside]
    look = 4 * owed.size + 64
    while True:
        limit = np.partition(sizes, look)[look] if look < inside.size else np.inf
        small = inside[sizes <= limit][::-1]  # the last of equals go first
        row = row_of[small]
        spared = small[counts[row] - 1 - _place_in_row(row, magnitude[small]) >= min_nonzeros]
        if spared.size >= owed.size or look >= inside.size:
            break
        look *= 4
    spared = spared[np.argsort(magnitude[spared], kind="stable")]
    kept[owed] = True
    kept[spared[: owed.size]] = False


def _place_in_row(rows: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """0 for the smallest key of each row, 1 for the next, and so on; equals in their order."""
    order = np.lexsort((keys, rows))
    sorted_rows = rows[order]
    first = np.searchsorted(sorted_rows, sorted_rows)
    place = np.empty(rows.size, np.int64)
    place[order] = np.arange(rows.size) - first
    return place


def _rank_within_row(rows: Tensor, values: Tensor) -> Tensor:
    """0 for the largest magnitude of each row, 1 for the next, and so on."""
    order = values.abs().sort(descending=True, stable=True).indices
    order = order[rows[order].sort(stable=True).indices]
    counts = torch.bincount(rows)
    first = (counts.cumsum(0) - counts)[rows[order]]
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device) - first
    return rank
