"""The CPU path of the magnitude projection: find the threshold without sorting the matrix.

A small sample brackets the threshold between two magnitudes `low` and `high`. One pass in
cache-sized pieces counts what lies above `high` and lists what lies between; which of these are
kept is settled on that short list by [`keep_largest`]. If the sample misled (it can, for a matrix
with structure), the bracket is widened until the list is the whole matrix: the result is exact
always, only the speed depends on luck. Rows with too few entries on the list to reach their minimum
are scanned completely, and their largest join the list.

Everything works on the bit patterns: those of non-negative floats, read as integers, sort like the
floats, for every float type alike, and NaN and infinity sort above all numbers.
"""

import math
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

from ..kernels.calling import map_pieces
from ..kernels.cpu import CpuKernels, compiled_kernels
from .keep_largest import INTEGER_VIEW, infinity_bits, largest_mask, not_finite

# Entries per piece of a pass: 1 MB of float32, which stays in the second-level cache.
_PIECE = 1 << 18
# One entry in so many is sampled, up to a limit at which the bracket holds about 1 % of the matrix.
# A matrix of less than `_SMALL` entries is listed outright.
_SAMPLE_STRIDE = 16
_SAMPLE_LIMIT = 1 << 16
_SMALL = 1 << 12
# A bracket reaches this many standard deviations of the sampled rank to either side.
_DEVIATIONS = 4.0
# A list for the row minimum holds so many times the minimum per row on average.
_LISTED_FOR_MINIMUM = 2
# Below this share of kept entries it is cheaper to list them all than to rewrite the matrix.
_LISTED_SHARE = 1 / 16


@dataclass
class _Matrix:
    """A contiguous 2-D weight seen as bit patterns, and what of it counts as a row."""

    bits: np.ndarray  # (numel,) integers, memory shared with the weight
    width: int  # entries per step of dimension 0
    row_dim: int
    min_nonzeros: int
    top: int  # bit pattern of infinity: the open upper end of every bracket
    kernels: CpuKernels | None

    @property
    def n_rows(self) -> int:
        return self.bits.size // self.width if self.row_dim == 0 else self.width

    def row_of(self, index: np.ndarray) -> np.ndarray:
        return index // self.width if self.row_dim == 0 else index % self.width

    def magnitude(self, index: np.ndarray) -> np.ndarray:
        return self.bits[index] & np.iinfo(self.bits.dtype).max


@dataclass
class _Scan:
    """What one pass over the matrix found for a bracket [low, high)."""

    low: int
    high: int
    above: int  # entries at or above `high`
    row_above: np.ndarray  # (n_rows,) the same per row; only filled in for a row minimum
    index: np.ndarray  # flat indices of the entries in the bracket, ascending
    magnitude: np.ndarray  # their bit patterns


def project_cpu_(weight: Tensor, k: int, min_nonzeros: int, row_dim: int) -> None:
    """Project a contiguous 2-D CPU tensor in place; see `project_topk_` for the definition."""
    bits = weight.view(-1).view(INTEGER_VIEW[weight.dtype]).numpy()
    top = infinity_bits(weight.dtype)
    matrix = _Matrix(bits, weight.shape[1], row_dim, min_nonzeros, top, compiled_kernels(weight))
    sample = _sample(matrix)
    for reach in (1, 8, 64, math.inf):
        scan = _scan(matrix, *_bracket(matrix, sample, k, reach))
        if scan.above + scan.index.size <= k and scan.low == 1:
            return  # no more than k nonzeros: all of them stay
        if _settle(weight.view(-1), matrix, scan, k):
            return


def _sample(matrix: _Matrix) -> np.ndarray | None:
    """Magnitudes from all over the matrix; None if it is too small to bother."""
    n = matrix.bits.size
    if n < _SMALL:
        return None
    stride = max(_SAMPLE_STRIDE, n // _SAMPLE_LIMIT) | 1
    while math.gcd(stride, matrix.width) != 1:  # so that every column is visited
        stride += 2
    return matrix.bits[::stride] & np.iinfo(matrix.bits.dtype).max


def _bracket(matrix: _Matrix, sample: np.ndarray | None, k: int, reach: float) -> tuple[int, int]:
    """A range [low, high) of magnitudes that very likely holds the k-th largest entry.

    `reach` widens it; at infinity it is certain to.
    """
    if sample is None or reach == math.inf:
        return 1, matrix.top  # all nonzeros
    share = k / matrix.bits.size
    if matrix.min_nonzeros:
        # List enough for most rows to find their minimum on the list.
        length = matrix.bits.size / matrix.n_rows
        share = max(share, min(_LISTED_SHARE, _LISTED_FOR_MINIMUM * matrix.min_nonzeros / length))
    rank = share * sample.size
    slack = reach * (_DEVIATIONS * math.sqrt(rank * (1 - share)) + 8)
    lower = max(0, sample.size - 1 - math.ceil(rank + slack))
    upper = min(sample.size - 1, sample.size - 1 - math.floor(rank - slack))
    ranked = np.partition(sample, (lower, upper))
    low = max(int(ranked[lower]), 1)  # zeros are never worth listing
    if share <= _LISTED_SHARE or rank <= slack:
        return low, matrix.top
    return low, max(int(ranked[upper]), low + 1)


def _scan(matrix: _Matrix, low: int, high: int) -> _Scan:
    """One pass over the matrix, in pieces (of whole rows, where rows are counted).

    Raises:
        ValueError: if an entry is NaN or infinite.
    """
    bits, width, top = matrix.bits, matrix.width, matrix.top
    integer = bits.dtype.type
    mask, low_bits, high_bits = integer(np.iinfo(bits.dtype).max), integer(low), integer(high)
    piece = max(1, _PIECE // width) * width if matrix.min_nonzeros else _PIECE

    count_rows = bool(matrix.min_nonzeros) and high < top

    def refuse(place: int) -> NoReturn:
        where = "(row {}, column {})".format(*divmod(place, width))
        raise not_finite((bits.size // width, width), where) from None

    def scan_by_kernel(start: int) -> tuple[np.ndarray, np.ndarray, int, np.ndarray | None]:
        part = bits[start : start + piece]
        row = width if matrix.min_nonzeros else part.size
        try:
            return matrix.kernels.list_range(part, row, low, high, start, count_rows)
        except FloatingPointError as error:
            refuse(start + error.args[0])

    def scan(start: int) -> tuple[np.ndarray, np.ndarray, int, np.ndarray | None]:
        a = bits[start : start + piece] & mask
        if a.max() >= top:
            refuse(start + int(a.argmax()))
        listed = a >= low_bits
        above, row_above = 0, None
        if high < top:
            over = a >= high_bits
            np.logical_xor(listed, over, out=listed)
            above = int(np.count_nonzero(over))
            if count_rows:
                grid = over.view(np.uint8).reshape(-1, width)
                axis = 1 if matrix.row_dim == 0 else 0
                row_above = grid.sum(axis=axis, dtype=np.uint32)
        found = np.flatnonzero(listed)
        magnitude = a[found]
        found += start
        return found, magnitude, above, row_above

    by_column = count_rows and matrix.row_dim == 1
    scanner = scan if matrix.kernels is None or by_column else scan_by_kernel
    parts = map_pieces(scanner, range(0, bits.size, piece))
    row_above = np.zeros(matrix.n_rows if matrix.min_nonzeros else 0, np.int64)
    by_row = [part[3] for part in parts if part[3] is not None]
    if by_row:
        stacked = np.concatenate(by_row) if matrix.row_dim == 0 else np.sum(by_row, axis=0)
        row_above += stacked.astype(np.int64)
    return _Scan(
        low,
        high,
        sum(part[2] for part in parts),
        row_above,
        np.concatenate([part[0] for part in parts]),
        np.concatenate([part[1] for part in parts]),
    )


def _settle(flat: Tensor, matrix: _Matrix, scan: _Scan, k: int) -> bool:
    """Zero what is not kept, in place; False, and nothing done, if the list is too short for that.

    Args:
        flat: the matrix, `(numel,)`.
    """
    k -= scan.above
    if not 0 <= k <= scan.index.size:
        return False
    index, magnitude, rows, listed = scan.index, scan.magnitude, None, scan.index.size
    if matrix.min_nonzeros and scan.row_above.min() < matrix.min_nonzeros:
        rows = matrix.row_of(index)
        counts = scan.row_above + np.bincount(rows, minlength=matrix.n_rows)
        short = _top_of_rows(matrix, np.flatnonzero(counts < matrix.min_nonzeros))
        short = short[matrix.magnitude(short) < scan.low]  # the others are listed, or above
        if short.size:
            index = np.concatenate([index, short])
            magnitude = np.concatenate([magnitude, matrix.magnitude(short)])
            rows = np.concatenate([rows, matrix.row_of(short)])
    keep = largest_mask(magnitude, k, rows, matrix.min_nonzeros, scan.row_above)
    bits, complete = matrix.bits, scan.high == matrix.top
    if complete:
        kept = index[keep]
        values = bits[kept]
        flat.zero_()
        bits[kept] = values
        return True
    if np.count_nonzero(keep) > k:
        return False  # entries above the list may have to go
    restore = index[listed:]  # all of them: their rows have no others
    values = bits[restore]
    keep = keep[:listed]
    # The smallest of the kept; all bits of the others are set, which makes them the largest.
    sizes = scan.magnitude | (keep.view(np.int8) - np.int8(1))
    threshold = int(sizes.view(f"u{sizes.itemsize}").min(initial=scan.high))
    dropped = scan.index[~keep & (scan.magnitude >= threshold)]
    zero_below_(flat, threshold, matrix.kernels)
    bits[dropped] = 0
    bits[restore] = values
    return True


def _top_of_rows(matrix: _Matrix, rows: np.ndarray) -> np.ndarray:
    """Flat indices of the `min_nonzeros` largest nonzeros of each of `rows`."""
    grid = matrix.bits.reshape(-1, matrix.width)
    length = matrix.bits.size // matrix.n_rows
    per_piece = max(1, _PIECE // length)
    found = [np.empty(0, np.int64)]
    for start in range(0, rows.size, per_piece):
        part = rows[start : start + per_piece]
        a = grid[part] if matrix.row_dim == 0 else np.ascontiguousarray(grid[:, part].T)
        a &= np.iinfo(a.dtype).max
        each = np.arange(part.size)
        # Taking the maximum a few times beats partitioning each row, and of equal ones it takes
        # the first.
        for _ in range(min(matrix.min_nonzeros, length)):
            best = a.argmax(axis=1)
            some = a[each, best] > 0
            a[each, best] = 0
            i, j = part[some], best[some]
            found.append(i * matrix.width + j if matrix.row_dim == 0 else j * matrix.width + i)
    return np.concatenate(found)


def zero_below_(flat: Tensor, threshold: int, kernels: CpuKernels | None) -> None:
    """Zero, in place, what of `(n,)` is smaller in magnitude than the float of a bit pattern."""
    if kernels is not None:
        return kernels.zero_below(flat, threshold)
    below = torch.tensor(threshold - 1, dtype=INTEGER_VIEW[flat.dtype]).view(flat.dtype).item()
    for piece in flat.split(_PIECE):
        piece.copy_(torch.nn.functional.hardshrink(piece, below))  # keeps what is larger than below
