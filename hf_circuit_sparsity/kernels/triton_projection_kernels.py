"""The Triton kernels of the projection of many matrices; `triton_projection.py` launches them.

Every program looks up which matrix it works on, and what the host has written down of it. What the
kernels find out they tell each other in a state of its own for each matrix.
"""

import triton
import triton.language as tl

from .triton_search import kth_largest

SAMPLE = tl.constexpr(8192)
_BINS = tl.constexpr(2048)  # of one digit of the search among the listed entries
_DIGIT = tl.constexpr(11)  # their logarithm
_ALL = tl.constexpr(2**31 - 1)
# What is fixed of a matrix, in int64: its address, entries and columns, whether the rows with a
# minimum are its columns, the minimum, where what they keep is set aside, its first block and its
# blocks, and how far apart the entries of the sample are.
_AT, _N, _WIDTH, _COLUMNS, _MINIMUM, _FIRST_KEPT, _FIRST_BLOCK, _BLOCKS, _STRIDE, FACTS = (
    tl.constexpr(i) for i in range(10)
)
# What the kernels tell each other of a matrix, in int32: the bracket of the threshold, how many
# entries are above and within it, the same for the other side, whether anything is not finite, how
# many entries the rows keep;
_LOW, _HIGH, _ABOVE, _LISTED, _ABOVE_2, _LISTED_2, _NOT_FINITE, _IN_ROWS = (
    tl.constexpr(i) for i in range(8)
)
# the threshold as far as its digits are known, the bits that are not, how many entries that begin
# like it are to be kept, whether that is settled, the block in which equals stop being kept and how
# many of them it keeps, how many programs are done with each kernel; the counts of each digit.
_THRESHOLD, _SHIFT, _NEED, _SETTLED, _CUT_BLOCK, _CUT_ROOM, _DONE, _HISTOGRAMS, STATE = (
    tl.constexpr(i) for i in (*range(8, 15), 32, 32 + 3 * 2048)
)


@triton.jit
def _fact(facts, matrix, name: tl.constexpr):
    return tl.load(facts + matrix * FACTS + name)


@triton.jit
def _entries(facts, matrix, ELEMENT: tl.constexpr, ALIGNED: tl.constexpr):
    """Where a matrix is, and how many entries it has."""
    bits = _fact(facts, matrix, _AT).to(tl.pointer_type(ELEMENT))
    n = _fact(facts, matrix, _N).to(tl.int32)
    if ALIGNED:
        bits = tl.multiple_of(bits, 16)
        n = tl.multiple_of(n, 16)
    return bits, n


@triton.jit
def set_aside(
    facts, state, matrix_of, row_of, aside_at, aside, LARGEST: tl.constexpr, TOP: tl.constexpr,
    ELEMENT: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write down the largest nonzeros of a row, the first of equals, and put zeros in place."""
    matrix = tl.load(matrix_of + tl.program_id(0))
    row = tl.load(row_of + tl.program_id(0))
    bits, n = _entries(facts, matrix, ELEMENT, ALIGNED)
    width = _fact(facts, matrix, _WIDTH).to(tl.int32)
    k = _fact(facts, matrix, _MINIMUM).to(tl.int32)
    by_column = _fact(facts, matrix, _COLUMNS) != 0
    length = tl.where(by_column, n // width, width)
    start = row * tl.where(by_column, 1, width)
    step = tl.where(by_column, width, 1)
    place = tl.arange(0, BLOCK)
    inside = place < length
    a = tl.load(bits + start + place * step, mask=inside, other=0).to(tl.int32) & LARGEST
    a = tl.where(inside, a, -1)
    own = _fact(facts, matrix, _FIRST_KEPT) + row.to(tl.int64) * k
    kept = k * 0
    i = k * 0
    while i < k:
        magnitude, found = tl.max(a, 0, return_indices=True)
        if i == 0 and magnitude >= TOP:
            tl.store(state + matrix * STATE + _NOT_FINITE, 1)
        at = bits + start + found * step
        nonzero = magnitude > 0
        tl.store(aside_at + own + i, tl.where(nonzero, at.to(tl.int64), 0))
        tl.store(aside + own + i, tl.load(at))
        tl.store(at, tl.zeros((), ELEMENT), mask=nonzero)
        kept += nonzero.to(tl.int32)
        a = tl.where(place == found, -1, a)
        i += 1
    tl.atomic_add(state + matrix * STATE + _IN_ROWS, kept, sem="relaxed")


@triton.jit
def put_back(aside_at, aside, n, ELEMENT: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = tl.load(aside_at + i, mask=i < n, other=0)
    values = tl.load(aside + i, mask=i < n, other=0)
    tl.store(at.to(tl.pointer_type(ELEMENT)), values, mask=at != 0)


@triton.jit
def bracket(
    facts, state, budgets, LARGEST: tl.constexpr, TOP: tl.constexpr,
    ELEMENT: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """A range of magnitudes that very likely holds the threshold; all nonzeros if it is small."""
    matrix = tl.program_id(0)
    bits, n = _entries(facts, matrix, ELEMENT, ALIGNED)
    state += matrix * STATE
    budget = tl.maximum(tl.load(budgets + matrix) - tl.load(state + _IN_ROWS), 0)
    low = budget * 0 + 1
    high = budget * 0 + TOP
    if n >= 2 * SAMPLE:
        at = tl.arange(0, SAMPLE) * _fact(facts, matrix, _STRIDE) % n
        a = tl.load(bits + at).to(tl.int32) & LARGEST
        share = budget.to(tl.float32) / n
        rank = share * SAMPLE
        slack = 4.0 * tl.sqrt(tl.maximum(rank * (1.0 - share), 0.0)) + 8.0
        tolerance = (slack / 4).to(tl.int32)
        lower = (rank + slack).to(tl.int32)
        upper = (rank - slack).to(tl.int32) - tolerance
        if lower < SAMPLE:
            value, _n = kth_largest(a, lower, tolerance)
            low = tl.maximum(value, 1)
        if upper > 0:
            value, _n = kth_largest(a, upper, tolerance)
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


@triton.jit
def list_near(
    facts, state, budgets, LARGEST: tl.constexpr, TOP: tl.constexpr,
    matrix_of, counts, listed, AGAIN: tl.constexpr,
    ELEMENT: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Count what is above the bracket and list what is in it; again if it held no threshold."""
    program = tl.program_id(0)
    matrix = tl.load(matrix_of + program)
    state += matrix * STATE
    budget, low, high, above, held = _first_look(state, tl.load(budgets + matrix))
    if AGAIN:
        too_high = above > budget
        low, high = tl.where(too_high, high, 1), tl.where(too_high, TOP, low)
    if not AGAIN or not held:
        bits, n = _entries(facts, matrix, ELEMENT, ALIGNED)
        start = (program - _fact(facts, matrix, _FIRST_BLOCK).to(tl.int32)) * BLOCK
        at = start + tl.arange(0, BLOCK)
        inside = at < n
        a = tl.load(bits + at, mask=inside, other=0).to(tl.int32) & LARGEST
        if not AGAIN and tl.max(a, 0) >= TOP:
            tl.store(state + _NOT_FINITE, 1)
        within = ((a >= low) & (a < high)).to(tl.int32)
        place = tl.cumsum(within, 0) - 1
        own = listed + program.to(tl.int64) * BLOCK
        tl.store(own + place, a.to(listed.dtype.element_ty), mask=within > 0)
        count = tl.sum(within, 0)
        tl.store(counts + program, count)
        over = tl.sum((a >= high).to(tl.int32), 0)
        tl.atomic_add(state + (_ABOVE_2 if AGAIN else _ABOVE), over, sem="relaxed")
        tl.atomic_add(state + (_LISTED_2 if AGAIN else _LISTED), count, sem="relaxed")


@triton.jit
def _is_last(state, kernel, blocks):
    """Whether all other programs of a matrix are done, and what they wrote can be read."""
    tl.debug_barrier()
    return tl.atomic_add(state + _DONE + kernel, 1) == blocks - 1


@triton.jit(do_not_specialize=["all_blocks"])
def count_digit(
    facts, state, budgets, matrix_of, counts, listed, all_blocks, TOP: tl.constexpr,
    DIGIT: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One more digit of the threshold; the first is counted from the bottom of the bracket."""
    program = tl.program_id(0)
    matrix = tl.load(matrix_of + program)
    state += matrix * STATE
    blocks = _fact(facts, matrix, _BLOCKS).to(tl.int32)
    if DIGIT == 0:
        budget, base, high, above, held = _first_look(state, tl.load(budgets + matrix))
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
        own = listed + program.to(tl.int64) * BLOCK
        count = tl.load(counts + program)
        start = count * 0
        while start < count:
            i = start + tl.arange(0, CHUNK)
            a = tl.load(own + i, mask=i < count, other=0).to(tl.int32)
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


@triton.jit(do_not_specialize=["all_blocks"])
def find_cut(
    facts, state, budgets, matrix_of, counts, listed, all_blocks, BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Among equals of the threshold the first are kept: the block that holds the last of them."""
    program = tl.program_id(0)
    matrix = tl.load(matrix_of + program)
    state += matrix * STATE
    if tl.load(state + _SETTLED) == 0:
        threshold = tl.load(state + _THRESHOLD)
        own = listed + program.to(tl.int64) * BLOCK
        count = tl.load(counts + program)
        ties = count * 0
        start = count * 0
        while start < count:
            i = start + tl.arange(0, CHUNK)
            a = tl.load(own + i, mask=i < count, other=0).to(tl.int32)
            ties += tl.sum((a == threshold).to(tl.int32), 0)
            start += CHUNK
        tl.store(counts + all_blocks + program, ties)
        blocks = _fact(facts, matrix, _BLOCKS).to(tl.int32)
        if _is_last(state, 3, blocks):
            first = all_blocks + _fact(facts, matrix, _FIRST_BLOCK).to(tl.int32)
            room = tl.load(state + _NEED)
            full = count * 0  # blocks all of whose ties are kept
            used = count * 0  # by them
            passed = count * 0
            start = count * 0
            while start < blocks:
                i = start + tl.arange(0, CHUNK)
                ties_of = tl.load(
                    counts + first + i, mask=i < blocks, other=0, cache_modifier=".cg"
                )
                fits = (i < blocks) & (passed + tl.cumsum(ties_of, 0) <= room)
                full += tl.sum(fits.to(tl.int32), 0)
                used += tl.sum(tl.where(fits, ties_of, 0), 0)
                passed += tl.sum(ties_of, 0)
                start += CHUNK
            tl.store(state + _CUT_BLOCK, full)
            tl.store(state + _CUT_ROOM, room - used)


@triton.jit
def zero(
    facts, state, LARGEST: tl.constexpr, matrix_of, not_finite,
    ELEMENT: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Zero what is not kept; nothing if the matrix is not finite, whose shape is written down."""
    program = tl.program_id(0)
    matrix = tl.load(matrix_of + program)
    state += matrix * STATE
    block = program - _fact(facts, matrix, _FIRST_BLOCK).to(tl.int32)
    bits, n = _entries(facts, matrix, ELEMENT, ALIGNED)
    if tl.load(state + _NOT_FINITE) != 0:
        if block == 0:
            width = _fact(facts, matrix, _WIDTH).to(tl.int32)
            tl.store(not_finite, n // width)
            tl.store(not_finite + 1, width)
    else:
        threshold = tl.load(state + _THRESHOLD)
        cut = tl.load(state + _CUT_BLOCK)
        at = block * BLOCK + tl.arange(0, BLOCK)
        inside = at < n
        values = tl.load(bits + at, mask=inside, other=0)
        a = values.to(tl.int32) & LARGEST
        keep = (a > threshold) | ((a == threshold) & (block < cut))
        if block == cut:
            tied = (a == threshold).to(tl.int32)
            keep = keep | ((tied > 0) & (tl.cumsum(tied, 0) <= tl.load(state + _CUT_ROOM)))
        tl.store(bits + at, tl.where(keep, values, 0), mask=inside)
