"""Which of some listed values are the largest, with a minimum for each row: exact, and fast."""

import numpy as np
import torch
from torch import Tensor


def positions_of(mask: Tensor) -> Tensor:
    """Where a mask, `(n,)`, is true, ascending."""
    if mask.device.type != "cpu":
        return mask.nonzero().flatten()
    # Where few are, numpy takes a tenth of the time.
    return torch.from_numpy(np.flatnonzero(mask.numpy()))


def keep_largest(
    values: Tensor, k: int, rows: Tensor | None = None, min_nonzeros: int = 0
) -> Tensor:
    """Which of the listed values are among the `k` largest magnitudes; [`project_topk_`].

    [`keep_largest_reference`] says what that is, by sorting.

    Args:
        values: `(n,)`; equal magnitudes are kept first come, first served.
        k: how many to keep.
        rows: the row of every value, `(n,)`; needed with a row minimum.
        min_nonzeros: values that each row keeps in any case.

    Returns:
        `(n,)` bool. Values of zero are never kept.
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
    """[`keep_largest`], written plainly; also what runs on other devices."""
    magnitude = values.abs()
    safe = torch.zeros_like(values, dtype=torch.bool)
    if min_nonzeros and rows is not None:
        safe = (_rank_within_row(rows, values) < min_nonzeros) & (values != 0)
    order = torch.where(safe, torch.inf, magnitude).sort(descending=True, stable=True).indices
    kept = safe.clone()
    kept[order[: max(0, k)]] = True
    return kept & (values != 0)


def _largest(magnitude: np.ndarray, k: int) -> np.ndarray:
    """Mask of the `k` largest, the first of equals, without zeros."""
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
