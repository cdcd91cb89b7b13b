"""The magnitude projection of many matrices on a GPU, in Triton, in one chain of launches.

For one matrix at a time a model's projection is hundreds of launches, each longer in coming than in
running. Here every program looks up which matrix it works on.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_search import INTEGER, MAX_WIDTH, infinity, kth_largest, largest, on, warps

# Entries of the matrices of one chain: the list of what is near a threshold takes as many.
MOST_ENTRIES = 2**26
_SAMPLE = tl.constexpr(8192)
_BINS = tl.constexpr(2048)  # of one digit of the search among the listed entries
_DIGIT = tl.constexpr(11)  # their logarithm
_ALL = tl.constexpr(2**31 - 1)
# What is fixed of a matrix, in int64: its address, entries and columns, whether the rows with a
# minimum are its columns, the minimum, where what they keep is set aside, its first block and its
# blocks, and how far apart the entries of the sample are.
_AT, _N, _WIDTH, _COLUMNS, _MINIMUM, _FIRST_KEPT, _FIRST_BLOCK, _BLOCKS, _STRIDE, _FACTS = (
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
_THRESHOLD, _SHIFT, _NEED, _SETTLED, _CUT_BLOCK, _CUT_ROOM, _DONE, _HISTOGRAMS, _STATE = (
    tl.constexpr(i) for i in (*range(8, 15), 32, 32 + 3 * 2048)
)


class TritonProjection:
    """The magnitude projection; see `project_topk_` for the definition.

    Args:
        per_thread: entries of a row that one thread holds.
        block: entries of a matrix that one program reads.
        warps: of such a program.
    """

    def __init__(self, per_thread: int = 32, block: int = 4096, warps: int = 4):
        self.per_thread, self.block, self.warps = per_thread, block, warps
        # Rows and columns of a matrix that was not finite, by device, and their copy on the host.
        self._not_finite: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def can_project(self, matrix: Tensor, min_nonzeros: int, row_dim: int) -> bool:
        """Whether `project_` takes a contiguous matrix."""
        row = matrix.shape[1 - row_dim] if min_nonzeros else 0
        return row <= MAX_WIDTH and 0 < matrix.numel() < 2**31 - 2**20

    def project_(
        self,
        matrices: Sequence[Tensor],
        budgets: Sequence[int],
        minima: Sequence[int],
        row_dims: Sequence[int],
    ) -> None:
        """Keep the largest magnitudes of each matrix in place.

        What the rows keep is set aside, and zero meanwhile. A small sample brackets the threshold
        of the rest. One pass counts what lies above the bracket and lists what lies within. The
        threshold is found on that list, digit by digit, and a last pass zeroes what is below it.
        If the sample misled, the other side is listed as well.

        Args:
            matrices: contiguous, of 16 or 32 bits, on one device; left alone if not finite.
            budgets: entries that each keeps.
            minima: entries that each row of a matrix keeps in any case.
            row_dims: dimensions that the minima count as rows.

        Raises:
            FloatingPointError: with the shape of a matrix in an *earlier* call that was not finite.
        """
        device = matrices[0].device
        not_finite, told = self._flags(device)
        if told[0]:
            shape = tuple(told.tolist())
            not_finite.zero_()
            told.zero_()
            raise FloatingPointError(shape)
        places = tuple((m.data_ptr(), m.dtype, m.shape) for m in matrices)
        with on(device):
            for chain in _chains(places, tuple(minima), tuple(row_dims), self.block, device):
                self._launch(chain, tuple(budgets[i] for i in chain.members), not_finite)
        told.copy_(not_finite, non_blocking=True)

    def _launch(self, chain: "_Chain", budgets: tuple[int, ...], not_finite: Tensor) -> None:
        device, dtype, blocks = chain.facts.device, chain.dtype, len(chain.matrix_of_block)
        largest, top, names = _of_dtype(dtype)
        names = {**names, "ALIGNED": chain.aligned}
        kept = chain.budgets(budgets)
        state = torch.zeros((len(budgets), _STATE.value), dtype=torch.int32, device=device)
        counts = torch.empty(2 * blocks, dtype=torch.int32, device=device)
        listed = torch.empty(blocks * self.block, dtype=INTEGER[dtype.itemsize], device=device)
        aside_at = torch.empty(chain.kept_by_rows, dtype=torch.int64, device=device)
        aside = torch.empty(chain.kept_by_rows, dtype=listed.dtype, device=device)
        common = (chain.facts, state, kept, largest, top)
        for width, (matrix_of_row, row) in chain.row_tables.items():
            _set_aside[(len(row),)](
                chain.facts, state, matrix_of_row, row, aside_at, aside, largest, top, **names,
                BLOCK=width, num_warps=warps(width, self.per_thread),
            )  # fmt: skip
        _bracket[(len(budgets),)](*common, **names, num_warps=16)
        per_block = (chain.matrix_of_block, counts, listed)
        names["BLOCK"] = self.block
        for again in (False, True):
            _list[(blocks,)](*common, *per_block, again, **names, num_warps=self.warps)
        lists = (chain.facts, state, kept, *per_block, blocks)
        for digit in range(2 if dtype.itemsize == 2 else 3):
            _count_digit[(blocks,)](*lists, top, digit, self.block, 512, num_warps=4)
        _find_cut[(blocks,)](*lists, self.block, 512, num_warps=4)
        _zero[(blocks,)](
            *common[:2], largest, chain.matrix_of_block, not_finite, **names, num_warps=self.warps
        )
        if chain.kept_by_rows:
            _put_back[(triton.cdiv(chain.kept_by_rows, 1024),)](
                aside_at, aside, chain.kept_by_rows, names["ELEMENT"], 1024
            )

    def _flags(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._not_finite:
            on_host = torch.zeros(2, dtype=torch.int32, pin_memory=device.type == "cuda")
            self._not_finite[device] = on_host.to(device, copy=True), on_host
        return self._not_finite[device]


@lru_cache
def _of_dtype(dtype: torch.dtype) -> tuple[int, int, dict]:
    """All bits but the sign, those of infinity, and as what the kernels read the entries."""
    return largest(dtype), infinity(dtype), {"ELEMENT": {2: tl.int16, 4: tl.int32}[dtype.itemsize]}


class _Chain:
    """Matrices of one dtype that are projected together, and what the programs look up of them.

    It knows them by their addresses alone, so that it keeps none alive.

    Args:
        members: their places in the call.
        places: address, dtype and shape of each.
        minima, row_dims: of each.
        block: entries that one program reads.
        device: of the tables.

    Attributes:
        facts: of each matrix, `(matrices, _FACTS)`, int64.
        matrix_of_block: which matrix each program reads, int32.
        row_tables: by the power of two that holds a row: the matrix of each row with a minimum, and
            its number in that, int32.
        kept_by_rows: entries that all these rows keep at most.
        aligned: whether addresses and sizes allow wide loads.
    """

    def __init__(
        self,
        members: Sequence[int],
        places: Sequence[tuple[int, torch.dtype, torch.Size]],
        minima: Sequence[int],
        row_dims: Sequence[int],
        block: int,
        device: torch.device,
    ) -> None:
        self.members, self.dtype = members, places[0][1]
        facts, owners, self.kept_by_rows = [], [], 0
        by_width: dict[int, tuple[list[Tensor], list[Tensor]]] = {}
        cases = zip(places, minima, row_dims, strict=True)
        for i, ((address, _, shape), minimum, row_dim) in enumerate(cases):
            n, (neurons, length) = shape.numel(), (shape[row_dim], shape[1 - row_dim])
            minimum, blocks = min(minimum, length), triton.cdiv(n, block)
            stride = max(1, n // _SAMPLE.value)
            while math.gcd(stride, shape[1]) != 1:  # so that every column is visited
                stride += 1
            facts.append([
                address, n, shape[1], row_dim, minimum, self.kept_by_rows, len(owners), blocks,
                stride,
            ])  # fmt: skip
            owners += [i] * blocks
            if minimum:
                tables = by_width.setdefault(triton.next_power_of_2(length), ([], []))
                tables[0].append(torch.full((neurons,), i, dtype=torch.int32))
                tables[1].append(torch.arange(neurons, dtype=torch.int32))
                self.kept_by_rows += neurons * minimum
        self.facts = torch.tensor(facts, dtype=torch.int64).to(device)
        self.matrix_of_block = torch.tensor(owners, dtype=torch.int32).to(device)
        self.row_tables = {
            power: (torch.cat(matrix_of).to(device), torch.cat(row).to(device))
            for power, (matrix_of, row) in by_width.items()
        }
        self.aligned = all(at % 16 == 0 and shape.numel() % 16 == 0 for at, _, shape in places)
        self._budgets: tuple[tuple[int, ...], Tensor] | None = None

    def budgets(self, budgets: tuple[int, ...]) -> Tensor:
        """Entries that each matrix keeps, int32 on the device; copied only when they change."""
        if self._budgets is None or self._budgets[0] != budgets:
            on_host = torch.tensor(budgets, dtype=torch.int32)
            if self.facts.device.type == "cuda":  # else the host would wait for the device
                on_host = on_host.pin_memory()
            self._budgets = budgets, on_host.to(self.facts.device, non_blocking=True, copy=True)
        return self._budgets[1]


@lru_cache(16)
def _chains(
    places: tuple[tuple[int, torch.dtype, torch.Size], ...],
    minima: tuple[int, ...],
    row_dims: tuple[int, ...],
    block: int,
    device: torch.device,
) -> list[_Chain]:
    """Chains of matrices of one dtype and at most `MOST_ENTRIES`, or of one matrix."""
    members: list[list[int]] = []
    last: dict[torch.dtype, tuple[list[int], int]] = {}
    for i, (_, dtype, shape) in enumerate(places):
        of_dtype, entries = last.get(dtype, (None, 0))
        if of_dtype is None or entries + shape.numel() > MOST_ENTRIES:
            of_dtype, entries = [], 0
            members.append(of_dtype)
        of_dtype.append(i)
        last[dtype] = of_dtype, entries + shape.numel()
    return [
        _Chain(
            of_chain, *([part[i] for i in of_chain] for part in (places, minima, row_dims)),
            block, device,
        )
        for of_chain in members
    ]  # fmt: skip


@triton.jit
def _fact(facts, matrix, name: tl.constexpr):
    return tl.load(facts + matrix * _FACTS + name)


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
def _set_aside(
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
            tl.store(state + matrix * _STATE + _NOT_FINITE, 1)
        at = bits + start + found * step
        nonzero = magnitude > 0
        tl.store(aside_at + own + i, tl.where(nonzero, at.to(tl.int64), 0))
        tl.store(aside + own + i, tl.load(at))
        tl.store(at, tl.zeros((), ELEMENT), mask=nonzero)
        kept += nonzero.to(tl.int32)
        a = tl.where(place == found, -1, a)
        i += 1
    tl.atomic_add(state + matrix * _STATE + _IN_ROWS, kept, sem="relaxed")


@triton.jit
def _put_back(aside_at, aside, n, ELEMENT: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = tl.load(aside_at + i, mask=i < n, other=0)
    values = tl.load(aside + i, mask=i < n, other=0)
    tl.store(at.to(tl.pointer_type(ELEMENT)), values, mask=at != 0)


@triton.jit
def _bracket(
    facts, state, budgets, LARGEST: tl.constexpr, TOP: tl.constexpr,
    ELEMENT: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """A range of magnitudes that very likely holds the threshold; all nonzeros if it is small."""
    matrix = tl.program_id(0)
    bits, n = _entries(facts, matrix, ELEMENT, ALIGNED)
    state += matrix * _STATE
    budget = tl.maximum(tl.load(budgets + matrix) - tl.load(state + _IN_ROWS), 0)
    low = budget * 0 + 1
    high = budget * 0 + TOP
    if n >= 2 * _SAMPLE:
        at = tl.arange(0, _SAMPLE) * _fact(facts, matrix, _STRIDE) % n
        a = tl.load(bits + at).to(tl.int32) & LARGEST
        share = budget.to(tl.float32) / n
        rank = share * _SAMPLE
        slack = 4.0 * tl.sqrt(tl.maximum(rank * (1.0 - share), 0.0)) + 8.0
        tolerance = (slack / 4).to(tl.int32)
        lower = (rank + slack).to(tl.int32)
        upper = (rank - slack).to(tl.int32) - tolerance
        if lower < _SAMPLE:
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
def _list(
    facts, state, budgets, LARGEST: tl.constexpr, TOP: tl.constexpr,
    matrix_of, counts, listed, AGAIN: tl.constexpr,
    ELEMENT: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Count what is above the bracket and list what is in it; again if it held no threshold."""
    program = tl.program_id(0)
    matrix = tl.load(matrix_of + program)
    state += matrix * _STATE
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
def _count_digit(
    facts, state, budgets, matrix_of, counts, listed, all_blocks, TOP: tl.constexpr,
    DIGIT: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One more digit of the threshold; the first is counted from the bottom of the bracket."""
    program = tl.program_id(0)
    matrix = tl.load(matrix_of + program)
    state += matrix * _STATE
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
def _find_cut(
    facts, state, budgets, matrix_of, counts, listed, all_blocks, BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Among equals of the threshold the first are kept: the block that holds the last of them."""
    program = tl.program_id(0)
    matrix = tl.load(matrix_of + program)
    state += matrix * _STATE
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
def _zero(
    facts, state, LARGEST: tl.constexpr, matrix_of, not_finite,
    ELEMENT: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Zero what is not kept; nothing if the matrix is not finite, whose shape is written down."""
    program = tl.program_id(0)
    matrix = tl.load(matrix_of + program)
    state += matrix * _STATE
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
