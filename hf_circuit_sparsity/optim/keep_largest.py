"""Which of some listed values are the largest, with a minimum for each row: exact, and fast."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

# The bits of a non-negative float, read as an integer, sort like the float.
INTEGER_VIEW: dict[torch.dtype, torch.dtype] = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}


# Up to so many largest entries of a row are found one after the other.
_FEW = 16


def infinity_bits(dtype: torch.dtype) -> int:
    """The bit pattern of +infinity as an integer; what is not a finite number is at or above it."""
    return int(torch.tensor(math.inf, dtype=dtype).view(INTEGER_VIEW[dtype]))


def not_finite(shape: Sequence[int], where: str = "") -> ValueError:
    """The error for a weight that holds NaN or infinity."""
    return ValueError(
        f"a weight of shape {tuple(shape)} holds NaN or infinity{where and ' ' + where}, which "
        "cannot be ranked: find the step that produced it (a lower learning rate or float32 "
        "usually helps)."
    )


def positions_of(mask: Tensor) -> Tensor:
    """Where a mask, `(n,)`, is true, ascending."""
    if mask.device.type != "cpu":
        return mask.nonzero().flatten()
    # Where few are, numpy takes a tenth of the time.
    return torch.from_numpy(np.flatnonzero(mask.numpy()))


def leaders_of_rows(magnitude: Tensor, count: int) -> Tensor:
    """Where the `count` largest of each row are that are not zero; of equals the first.

    Args:
        magnitude: bit patterns of magnitudes, `(rows, length)`.

    Returns:
        bool, `(rows, length)`.
    """
    count = min(count, magnitude.shape[1])
    smallest = magnitude.topk(count, dim=1).values[:, -1:]
    above, equal = magnitude > smallest, magnitude == smallest
    room = count - above.sum(dim=1, keepdim=True)
    first = equal & (equal.cumsum(dim=1, dtype=torch.int32) <= room)
    return (above | first) & (magnitude > 0)


def take_leaders_(magnitude: Tensor, count: int) -> Tensor:
    """Zero the entries of [`leaders_of_rows`], in place.

    Args:
        magnitude: `(rows, length)`, contiguous.

    Returns:
        Where in `magnitude.flatten()` they were, in any order.
    """
    if magnitude.device.type != "cpu" or count > _FEW:
        found = positions_of(leaders_of_rows(magnitude, count).flatten())
        magnitude.view(-1)[found] = 0
        return found
    # Taking the maximum a few times beats sorting, and of equal ones it takes the first.
    a, every = magnitude.numpy(), [np.empty(0, np.int64)]
    n_rows, length = a.shape
    for _ in range(min(count, length) if n_rows else 0):
        best = a.argmax(axis=1)
        rows = np.flatnonzero(a[np.arange(n_rows), best])
        every.append(rows * length + best[rows])
        a[rows, best[rows]] = 0
    return torch.from_numpy(np.concatenate(every))


def keep_largest(
    values: Tensor, k: int, rows: Tensor | None = None, min_nonzeros: int = 0
) -> Tensor:
    """Which of the listed values are among the `k` largest magnitudes; see [`project_topk_`].

    Args:
        values: `(n,)`; equal magnitudes are kept first come, first served.
        k: how many to keep.
        rows: the row of every value, `(n,)`; needed with a row minimum.
        min_nonzeros: values that each row keeps in any case.

    Returns:
        `(n,)` bool. Values of zero are never kept.
    """
    if values.device.type != "cpu":
        return keep_largest_reference(values, k, rows, min_nonzeros)
    rows_of = rows.numpy() if min_nonzeros and rows is not None else None
    bits = values.abs().view(INTEGER_VIEW[values.dtype]).numpy()
    return torch.from_numpy(largest_mask(bits, k, rows_of, min_nonzeros))


def keep_largest_reference(
    values: Tensor, k: int, rows: Tensor | None = None, min_nonzeros: int = 0
) -> Tensor:
    """[`keep_largest`], by sorting; also what runs on other devices."""
    magnitude = values.abs()
    safe = torch.zeros_like(values, dtype=torch.bool)
    if min_nonzeros and rows is not None and len(values):
        # The rank of every magnitude within its row, 0 for the largest.
        order = magnitude.sort(descending=True, stable=True).indices
        order = order[rows[order].sort(stable=True).indices]
        counts = torch.bincount(rows)
        first = (counts.cumsum(0) - counts)[rows[order]]
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order), device=order.device) - first
        safe = (rank < min_nonzeros) & (values != 0)
    order = torch.where(safe, torch.inf, magnitude).sort(descending=True, stable=True).indices
    keep = safe.clone()
    keep[order[: max(0, k)]] = True
    return keep & (values != 0)


def largest_mask(
    magnitude: np.ndarray,
    k: int,
    rows: np.ndarray | None = None,
    min_nonzeros: int = 0,
    held: np.ndarray | int = 0,
) -> np.ndarray:
    """[`keep_largest`] in numpy, for the bit patterns of magnitudes.

    Args:
        rows: None for no row minimum.
        held: values that each row keeps already and that are not listed, `(number of rows,)`.
    """
    n = magnitude.size
    if k >= n:
        return magnitude > 0
    keep = np.zeros(n, bool)
    if k > 0:
        threshold = np.partition(magnitude, n - k)[n - k]
        keep = magnitude >= threshold if threshold > 0 else magnitude > 0
        surplus = np.count_nonzero(keep) - k
        if surplus > 0:  # of those that equal the threshold the last ones are too many
            keep[np.flatnonzero(magnitude == threshold)[-surplus:]] = False
    if min_nonzeros and rows is not None:
        _enforce_minimum(magnitude, keep, rows, min_nonzeros, held)
    return keep


def _enforce_minimum(
    magnitude: np.ndarray,
    keep: np.ndarray,
    rows: np.ndarray,
    min_nonzeros: int,
    held: np.ndarray | int,
) -> None:
    """Enforce the row minimum, in place.

    Each row below it gets its own largest entries, and the smallest entries that other rows can
    spare are evicted. Nothing but these two kinds has to be sorted.
    """
    n_rows = len(held) if isinstance(held, np.ndarray) else int(rows.max()) + 1
    counts = np.bincount(rows[keep], minlength=n_rows) + held
    short = counts < min_nonzeros
    if not short.any():
        return
    dropped = np.flatnonzero(short[rows] & ~keep & (magnitude > 0))
    if not dropped.size:
        return
    row = rows[dropped]
    added = dropped[_rank_in_row(row, -magnitude[dropped]) + counts[row] < min_nonzeros]
    kept = np.flatnonzero(keep)
    sizes = magnitude[kept]
    look = 4 * added.size + 64
    while True:
        limit = np.partition(sizes, look)[look] if look < kept.size else sizes.max(initial=0)
        small = kept[sizes <= limit][::-1]  # the last of equals go first
        row = rows[small]
        evicted = small[counts[row] - 1 - _rank_in_row(row, magnitude[small]) >= min_nonzeros]
        if evicted.size >= added.size or look >= kept.size:
            break
        look *= 4
    evicted = evicted[_stable_order(magnitude[evicted])]
    keep[added] = True
    keep[evicted[: added.size]] = False


def _rank_in_row(rows: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """0 for the smallest key of each row, 1 for the next, and so on; equals in their order."""
    order = _stable_order(keys)
    order = order[_stable_order(rows[order].astype(np.int32))]
    sorted_rows = rows[order]
    first = np.flatnonzero(np.diff(sorted_rows, prepend=-1))
    lengths = np.diff(np.append(first, rows.size))
    rank = np.empty(rows.size, np.int64)
    rank[order] = np.arange(rows.size) - np.repeat(first, lengths)
    return rank


def _stable_order(keys: np.ndarray) -> np.ndarray:
    """`keys.argsort(kind="stable")` of integers, in a fraction of the time up to 32 bits."""
    if keys.dtype.itemsize > 4:
        return keys.argsort(kind="stable")
    packed = (keys.astype(np.int64) << 32) | np.arange(keys.size)
    packed.sort()
    return packed & 0xFFFFFFFF
