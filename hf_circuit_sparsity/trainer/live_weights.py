"""What random coordinate descent does with the nonzeros of a matrix: find, multiply, keep the best.

Positions are flat int64 indices into the matrix as stored, ascending, so that they are the pattern
of a CSR matrix as they stand.
"""

from functools import cached_property

import torch
from torch import Tensor

from ..modeling.sparse_linear import transposed
from .projection import project_topk_

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

    def sampled_product(self, left: Tensor, right: Tensor) -> Tensor:
        """``left.T @ right`` at the live coordinates only, ``(n,)`` in at least float32.

        Args:
            left: ``(tokens, rows)``.
            right: ``(tokens, width)``.
        """
        dtype = torch.promote_types(left.dtype, torch.float32)
        left, right = left.to(dtype), right.to(dtype)
        rows, width = self.shape
        # The kernel costs many times a dense product's price per entry.
        if len(self.live) * 8 > rows * width or not _has_sampled_kernel(left):
            return self._product_in_pieces(left, right)
        pattern = torch.sparse_csr_tensor(
            self.row_starts,
            self.columns,
            left.new_zeros(len(self.live)),
            self.shape,
            check_invariants=False,
        )
        product = torch.sparse.sampled_addmm(pattern, left.t().contiguous(), right, beta=0.0)
        return product.values()

    def _product_in_pieces(self, left: Tensor, right: Tensor) -> Tensor:
        """The same by dense products of a few rows at a time, read at the live coordinates."""
        rows, width = self.shape
        out = left.new_empty(len(self.live))
        step = max(1, _PIECE // max(1, width))
        for start in range(0, rows, step):
            stop = min(rows, start + step)
            first, last = int(self.row_starts[start]), int(self.row_starts[stop])
            if first < last:
                piece = left[:, start:stop].t() @ right
                out[first:last] = piece.flatten()[self.live[first:last] - start * width]
        return out


def _has_sampled_kernel(x: Tensor) -> bool:
    if x.device.type == "cpu":
        return torch.backends.mkl.is_available()
    return x.device.type == "cuda"


def keep_largest(
    values: Tensor, k: int, rows: Tensor | None = None, min_nonzeros: int = 0
) -> Tensor:
    """Which of the listed values are among the ``k`` largest magnitudes; :func:`project_topk_`.

    Args:
        values: ``(n,)``; equal magnitudes are kept first come, first served.
        k: how many to keep.
        rows: the row of every value, ``(n,)``; needed with a row minimum.
        min_nonzeros: values that each row keeps in any case.

    Returns:
        ``(n,)`` bool. Values of zero are never kept.
    """
    nonzero = values != 0
    kept = nonzero
    if len(values) > k:
        chosen = values.clone()
        project_topk_(chosen, k)
        kept = chosen != 0
    if not min_nonzeros or rows is None or bool((kept == nonzero).all()):
        return kept
    # Rows that come out short are owed their largest entries; only these are sorted.
    short = torch.bincount(rows[kept], minlength=int(rows.max()) + 1) < min_nonzeros
    owed = nonzero & ~kept & short[rows]
    if not owed.any():
        return kept
    # Nothing else can be among the largest of its row, or of all once these are safe.
    listed = (kept | owed).nonzero().flatten()
    values, rows = values[listed], rows[listed]
    safe = _rank_within_row(rows, values) < min_nonzeros
    rest = torch.where(safe, 0.0, values)
    project_topk_(rest, min(len(rest), max(0, k - int(safe.sum()))))
    kept = torch.zeros_like(kept)
    kept[listed] = safe | (rest != 0)
    return kept


def _rank_within_row(rows: Tensor, values: Tensor) -> Tensor:
    """0 for the largest magnitude of each row, 1 for the next, and so on."""
    order = values.abs().sort(descending=True, stable=True).indices
    order = order[rows[order].sort(stable=True).indices]
    counts = torch.bincount(rows)
    first = (counts.cumsum(0) - counts)[rows[order]]
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device) - first
    return rank
