"""AbsTopK and the magnitude projection on a GPU, in Triton.

Everything works on the bit patterns of the magnitudes: those of non-negative floats, read as
integers, sort like the floats, with NaN and infinity above all numbers. Every decision is made on
the device; the host waits for none.
"""

import contextlib
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .calling import as_rows
from .selection import SelectionKernels

# Longest row that one program holds.
MAX_WIDTH = 16384
_INTEGER = {2: torch.int16, 4: torch.int32}
_SAMPLE = tl.constexpr(8192)
_BINS = tl.constexpr(2048)  # of one digit of the search among the listed entries
_DIGIT = tl.constexpr(11)  # their logarithm
_ALL = tl.constexpr(2**31 - 1)
# What the kernels of one projection tell each other, in int32: the bracket of the threshold, how
# many entries are above and within it, the same for the other side, whether anything is not finite,
# and how many entries the rows keep;
_LOW, _HIGH, _ABOVE, _LISTED, _ABOVE_2, _LISTED_2, _NOT_FINITE, _IN_ROWS = (
    tl.constexpr(i) for i in range(8)
)
# the threshold as far as its digits are known, the bits that are not, how many entries that begin
# like it are to be kept, whether that is settled, the block in which equals stop being kept and how
# many of them it keeps, how many programs are done with each kernel; the counts of each digit.
_THRESHOLD, _SHIFT, _NEED, _SETTLED, _CUT_BLOCK, _CUT_ROOM, _DONE, _HISTOGRAMS = (
    tl.constexpr(i) for i in (*range(8, 15), 32)
)


class TritonKernels:
    """Selection by Triton; [`SelectionKernels`] says what its methods have in common.

    Args:
        per_thread: entries of a row that one thread holds.
        block: entries of a matrix that one program reads.
        warps: of such a program.
    """

    differentiable_abs_topk = SelectionKernels.differentiable_abs_topk

    def __init__(self, per_thread: int = 32, block: int = 4096, warps: int = 4):
        self.per_thread, self.block, self.warps = per_thread, block, warps
        # Rows and columns of a matrix that was not finite, by device, and their copy on the host.
        self._not_finite: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def abs_topk(self, x: Tensor, k: int, want_mask: bool) -> tuple[Tensor, Tensor | None]:
        """The k largest magnitudes of every row, zeros elsewhere, and a bool mask of them.

        Args:
            x: `(..., width)`, of 16 or 32 bits.
            k: 1 ≤ k < width.
        """
        rows = _integers(as_rows(x))
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        mask = torch.empty(x.shape, dtype=torch.bool, device=x.device) if want_mask else None
        flags = out if mask is None else mask.view(torch.int8)
        n, width = rows.shape
        with _on(x.device):
            _abs_topk[(n,)](
                rows, rows.stride(0), _integers(out), flags, width, k, _largest(x.dtype),
                want_mask, triton.next_power_of_2(width), num_warps=self._warps(width),
            )  # fmt: skip
        return out, mask

    def masked(self, x: Tensor, mask: Tensor) -> Tensor:
        """`x` where the bool `mask` of its shape is true, else 0."""
        return torch.where(mask, x, 0)

    def can_project(self, matrix: Tensor, min_nonzeros: int, row_dim: int) -> bool:
        """Whether `project_` takes a contiguous matrix."""
        row = matrix.shape[1 - row_dim] if min_nonzeros else 0
        return row <= MAX_WIDTH and 0 < matrix.numel() < 2**31 - 2**20

    def project_(self, matrix: Tensor, k: int, min_nonzeros: int, row_dim: int) -> None:
        """Keep the k largest magnitudes in place; see `project_topk_` for the definition.

        A small sample brackets the threshold. One pass counts what lies above the bracket and lists
        what lies within. The threshold is found on that list, digit by digit, and a last pass
        zeroes what is below it. If the sample misled, the other side is listed as well.

        Args:
            matrix: contiguous, of 16 or 32 bits; left alone if it is not finite.

        Raises:
            FloatingPointError: with the shape of a matrix in an *earlier* call that was not finite.
        """
        not_finite, told = self._flags(matrix.device)
        if told[0]:
            shape = tuple(told.tolist())
            not_finite.zero_()
            told.zero_()
            raise FloatingPointError(shape)
        bits, n, width = _integers(matrix), matrix.numel(), matrix.shape[1]
        blocks = triton.cdiv(n, self.block)
        device = matrix.device
        state = torch.zeros(_HISTOGRAMS.value + 3 * _BINS.value, dtype=torch.int32, device=device)
        counts = torch.empty(2 * blocks, dtype=torch.int32, device=device)
        listed = torch.empty(blocks * self.block, dtype=bits.dtype, device=device)
        kind = (1 + row_dim) if min_nonzeros else 0
        rows = matrix.shape[row_dim] if min_nonzeros else 1
        limits = torch.empty(2 * rows, dtype=torch.int32, device=device)
        largest, top = _largest(matrix.dtype), _infinity(matrix.dtype)
        common = (bits, limits, rows, state, n, k, largest, top)
        names = {"KIND": kind, "WIDTH": width if kind else 1}
        launch = {"BLOCK": self.block, "num_warps": self.warps}
        stride = max(1, n // _SAMPLE.value)
        while math.gcd(stride, width) != 1:  # so that every column is visited
            stride += 1
        with _on(device):
            if kind:
                row = matrix.shape[1 - row_dim]
                by_row = (width, 1) if row_dim == 0 else (1, width)
                _row_limits[(rows,)](
                    bits, *by_row, row, min(min_nonzeros, row), limits, rows, state, largest,
                    triton.next_power_of_2(row), num_warps=self._warps(row),
                )  # fmt: skip
            _bracket[(1,)](*common, stride, **names, num_warps=16)
            for again in (False, True):
                _list[(blocks,)](*common, counts, listed, again, **names, **launch)
            lists = (counts, listed, state, blocks)
            for digit in range(2 if bits.dtype == torch.int16 else 3):
                _count_digit[(blocks,)](*lists, k, top, digit, self.block, 256, num_warps=1)
            _find_cut[(blocks,)](*lists, self.block, 256, num_warps=1)
            _zero[(blocks,)](*common, not_finite, *matrix.shape, **names, **launch)
        told.copy_(not_finite, non_blocking=True)

    def _warps(self, width: int) -> int:
        warps = triton.next_power_of_2(width) // (32 * self.per_thread)
        return min(max(1, warps), 16)

    def _flags(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._not_finite:
            on_host = torch.zeros(2, dtype=torch.int32, pin_memory=device.type == "cuda")
            self._not_finite[device] = on_host.to(device, copy=True), on_host
        return self._not_finite[device]


def _integers(x: Tensor) -> Tensor:
    return x.view(_INTEGER[x.element_size()])


def _largest(dtype: torch.dtype) -> int:
    return 2 ** (8 * dtype.itemsize - 1) - 1


def _infinity(dtype: torch.dtype) -> int:
    return int(_integers(torch.tensor(math.inf, dtype=dtype)))


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@triton.jit
def _kth_largest(bits, k, tolerance):
    """A value that at least k entries reach, k + tolerance at most if possible; how many do.

    With no tolerance, the largest such value, if not exactly k entries reach a smaller one.
    """
    high = tl.max(bits, 0)
    low = high - high
    n = tl.sum((bits >= 0).to(tl.int32), 0)
    while low < high:
        gap = high - low
        middle = low + (gap >> 1) + (gap & 1)
        count = tl.sum((bits >= middle).to(tl.int32), 0)
        enough = count >= k
        n = tl.where(enough, count, n)
        low = tl.where(enough, middle, low)
        high = tl.where(enough, tl.where(count <= k + tolerance, middle, high), middle - 1)
    return low, n


@triton.jit(do_not_specialize=["k"])
def _abs_topk(
    x, stride, out, mask, width, k, LARGEST: tl.constexpr, MASK: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    values = tl.load(x + row * stride + column, mask=inside, other=0)
    bits = tl.where(inside, values.to(tl.int32) & LARGEST, -1)
    threshold, n = _kth_largest(bits, k, 0)
    keep = bits >= threshold
    if n > k:  # of those that equal the threshold the first are kept
        above = bits > threshold
        tied = (bits == threshold).to(tl.int32)
        room = k - tl.sum(above.to(tl.int32), 0)
        keep = above | ((tied > 0) & (tl.cumsum(tied, 0) <= room))
    tl.store(out + row * width + column, tl.where(keep, values, 0), mask=inside)
    if MASK:
        tl.store(mask + row * width + column, keep.to(tl.int8), mask=inside)


@triton.jit(do_not_specialize=["k", "rows"])
def _row_limits(
    bits, row_stride, stride, width, k, limits, rows, state,
    LARGEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The magnitude that the k largest nonzeros of a row reach, and the last of equals kept."""
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < width
    at = row.to(tl.int64) * row_stride + column.to(tl.int64) * stride
    a = tl.load(bits + at, mask=inside, other=0).to(tl.int32) & LARGEST
    a = tl.where(inside, a, -1)
    threshold, n = _kth_largest(a, k, 0)
    above = tl.sum((a > threshold).to(tl.int32), 0)
    last = threshold * 0 + BLOCK
    kept = threshold * 0 + k
    if threshold == 0:
        last = threshold - 1
        kept = above
    elif n > k:
        tied = (a == threshold).to(tl.int32)
        first = (tied > 0) & (tl.cumsum(tied, 0) <= k - above)
        last = tl.max(tl.where(first, column, -1), 0)
    tl.store(limits + row, threshold)
    tl.store(limits + rows + row, last)
    tl.atomic_add(state + _IN_ROWS, kept, sem="relaxed")


@triton.jit
def _rest(a, at, inside, limits, rows, KIND: tl.constexpr, WIDTH: tl.constexpr):
    """Magnitudes with 0 for those that a row minimum keeps, and which it keeps."""
    safe = a < 0
    if KIND > 0:
        row = at // WIDTH if KIND == 1 else at % WIDTH
        column = at % WIDTH if KIND == 1 else at // WIDTH
        limit = tl.load(limits + row, mask=inside, other=0)
        last = tl.load(limits + rows + row, mask=inside, other=0)
        safe = (a > limit) | ((a == limit) & (column <= last))
        a = tl.where(safe, 0, a)
    return a, safe


@triton.jit(do_not_specialize=["rows", "k", "stride", "n"])
def _bracket(
    bits, limits, rows, state, n, k, LARGEST: tl.constexpr, TOP: tl.constexpr, stride,
    KIND: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """A range of magnitudes that very likely holds the threshold; all nonzeros if it is small."""
    budget = tl.maximum(k - tl.load(state + _IN_ROWS), 0)
    low = budget * 0 + 1
    high = budget * 0 + TOP
    if n >= 2 * _SAMPLE:
        at = tl.arange(0, _SAMPLE) * stride % n
        a = tl.load(bits + at).to(tl.int32) & LARGEST
        a, _safe = _rest(a, at, at >= 0, limits, rows, KIND, WIDTH)
        share = budget.to(tl.float32) / n
        rank = share * _SAMPLE
        slack = 4.0 * tl.sqrt(tl.maximum(rank * (1.0 - share), 0.0)) + 8.0
        tolerance = (slack / 4).to(tl.int32)
        lower = (rank + slack).to(tl.int32)
        upper = (rank - slack).to(tl.int32) - tolerance
        if lower < _SAMPLE:
            value, _n = _kth_largest(a, lower, tolerance)
            low = tl.maximum(value, 1)
        if upper > 0:
            value, _n = _kth_largest(a, upper, tolerance)
            high = tl.minimum(tl.maximum(value, low) + 1, TOP)
    tl.store(state + _LOW, low)
    tl.store(state + _HIGH, high)


@triton.jit
def _first_look(state, k):
    """The budget without what rows keep, the first bracket, what is above, whether it held."""
    budget = tl.maximum(k - tl.load(state + _IN_ROWS), 0)
    above = tl.load(state + _ABOVE)
    low = tl.load(state + _LOW)
    reached = (above + tl.load(state + _LISTED) >= budget) | (low == 1)
    return budget, low, tl.load(state + _HIGH), above, (above <= budget) & reached


@triton.jit(do_not_specialize=["rows", "k"])
def _list(
    bits, limits, rows, state, n, k, LARGEST: tl.constexpr, TOP: tl.constexpr, counts, listed,
    AGAIN: tl.constexpr, KIND: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Count what is above the bracket and list what is in it; again if it held no threshold."""
    block = tl.program_id(0)
    budget, low, high, above, held = _first_look(state, k)
    if AGAIN:
        too_high = above > budget
        low, high = tl.where(too_high, high, 1), tl.where(too_high, TOP, low)
    if not AGAIN or not held:
        at = block * BLOCK + tl.arange(0, BLOCK)
        inside = at < n
        a = tl.load(bits + at, mask=inside, other=0).to(tl.int32) & LARGEST
        if not AGAIN and tl.max(a, 0) >= TOP:
            tl.store(state + _NOT_FINITE, 1)
        a, _safe = _rest(a, at, inside, limits, rows, KIND, WIDTH)
        within = ((a >= low) & (a < high)).to(tl.int32)
        place = block * BLOCK + tl.cumsum(within, 0) - 1
        tl.store(listed + place, a.to(listed.dtype.element_ty), mask=within > 0)
        count = tl.sum(within, 0)
        tl.store(counts + block, count)
        over = tl.sum((a >= high).to(tl.int32), 0)
        tl.atomic_add(state + (_ABOVE_2 if AGAIN else _ABOVE), over, sem="relaxed")
        tl.atomic_add(state + (_LISTED_2 if AGAIN else _LISTED), count, sem="relaxed")


@triton.jit
def _is_last(state, kernel, blocks):
    """Whether all other programs of a kernel are done, and what they wrote can be read."""
    tl.debug_barrier()
    return tl.atomic_add(state + _DONE + kernel, 1) == blocks - 1


@triton.jit(do_not_specialize=["blocks", "k"])
def _count_digit(
    counts, listed, state, blocks, k, TOP: tl.constexpr, DIGIT: tl.constexpr, BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """One more digit of the threshold; the first is counted from the bottom of the bracket."""
    block = tl.program_id(0)
    if DIGIT == 0:
        budget, base, high, above, held = _first_look(state, k)
        n_listed = tl.load(state + _LISTED)
        if not held:
            too_high = above > budget
            base, high = tl.where(too_high, high, 1), tl.where(too_high, TOP, base)
            above = tl.load(state + _ABOVE_2)
            n_listed = tl.load(state + _LISTED_2)
        need = budget - above
        exponent = ((high - base).to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127
        shift = tl.maximum(exponent + 1 - _DIGIT, 0)  # bits of the digits that follow
        open_ = blocks > 0
    else:
        base = tl.load(state + _THRESHOLD)
        need = tl.load(state + _NEED)
        before = tl.load(state + _SHIFT)
        high = base + (1 << before)
        shift = tl.maximum(before - _DIGIT, 0)
        open_ = (tl.load(state + _SETTLED) == 0) & (before > 0)
    if open_:
        bins = state + _HISTOGRAMS + DIGIT * _BINS
        count = tl.load(counts + block)
        start = count * 0
        while start < count:
            i = start + tl.arange(0, CHUNK)
            a = tl.load(listed + block * BLOCK + i, mask=i < count, other=0).to(tl.int32)
            fits = (a >= base) & (a < high)
            tl.atomic_add(bins + ((a - base) >> shift), 1, mask=fits, sem="relaxed")
            start += CHUNK
        if _is_last(state, DIGIT, blocks):
            bin_ = tl.arange(0, _BINS)
            entries = tl.load(bins + bin_, cache_modifier=".cg")
            higher = tl.sum(entries, 0) - tl.cumsum(entries, 0)  # in the bins above
            digit = tl.sum((higher + entries >= need).to(tl.int32), 0) - 1
            over = tl.sum(tl.where(bin_ > digit, entries, 0), 0)
            like = tl.sum(tl.where(bin_ == digit, entries, 0), 0)
            threshold = base + (digit << shift)
            cut = tl.where((shift == 0) & (need - over >= like), _ALL, 0)
            settled = cut
            if DIGIT == 0:  # all of the list is kept, or none
                if need >= n_listed:
                    threshold = base
                    cut = cut * 0 + _ALL
                    settled = cut
                if need <= 0:
                    threshold = high - 1
                    cut = cut * 0 - 1
                    settled = cut
            tl.store(state + _THRESHOLD, threshold)
            tl.store(state + _SHIFT, shift)
            tl.store(state + _NEED, need - over)
            tl.store(state + _CUT_BLOCK, cut)
            tl.store(state + _SETTLED, settled)


@triton.jit(do_not_specialize=["blocks"])
def _find_cut(counts, listed, state, blocks, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """Among equals of the threshold the first are kept: the block that holds the last of them."""
    block = tl.program_id(0)
    if tl.load(state + _SETTLED) == 0:
        threshold = tl.load(state + _THRESHOLD)
        count = tl.load(counts + block)
        ties = count * 0
        start = count * 0
        while start < count:
            i = start + tl.arange(0, CHUNK)
            a = tl.load(listed + block * BLOCK + i, mask=i < count, other=0).to(tl.int32)
            ties += tl.sum((a == threshold).to(tl.int32), 0)
            start += CHUNK
        tl.store(counts + blocks + block, ties)
        if _is_last(state, 3, blocks):
            room = tl.load(state + _NEED)
            full = count * 0  # blocks all of whose ties are kept
            used = count * 0  # by them
            passed = count * 0
            start = count * 0
            while start < blocks:
                i = start + tl.arange(0, CHUNK)
                ties_of = tl.load(
                    counts + blocks + i, mask=i < blocks, other=0, cache_modifier=".cg"
                )
                fits = (i < blocks) & (passed + tl.cumsum(ties_of, 0) <= room)
                full += tl.sum(fits.to(tl.int32), 0)
                used += tl.sum(tl.where(fits, ties_of, 0), 0)
                passed += tl.sum(ties_of, 0)
                start += CHUNK
            tl.store(state + _CUT_BLOCK, full)
            tl.store(state + _CUT_ROOM, room - used)


@triton.jit(do_not_specialize=["rows", "k", "n_rows", "width"])
def _zero(
    bits, limits, rows, state, n, k, LARGEST: tl.constexpr, TOP: tl.constexpr,
    not_finite, n_rows, width, KIND: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Zero what is not kept; nothing if the matrix is not finite, whose shape is written down."""
    block = tl.program_id(0)
    if tl.load(state + _NOT_FINITE) != 0:
        if block == 0:
            tl.store(not_finite, n_rows)
            tl.store(not_finite + 1, width)
    else:
        threshold = tl.load(state + _THRESHOLD)
        cut = tl.load(state + _CUT_BLOCK)
        at = block * BLOCK + tl.arange(0, BLOCK)
        inside = at < n
        values = tl.load(bits + at, mask=inside, other=0)
        a, safe = _rest(values.to(tl.int32) & LARGEST, at, inside, limits, rows, KIND, WIDTH)
        keep = safe | (a > threshold) | ((a == threshold) & (block < cut))
        if block == cut:
            tied = (a == threshold).to(tl.int32)
            keep = keep | ((tied > 0) & (tl.cumsum(tied, 0) <= tl.load(state + _CUT_ROOM)))
        tl.store(bits + at, tl.where(keep, values, 0), mask=inside)
