"""The magnitude projection of many matrices on a GPU, in Triton, in one chain of launches.

For one matrix at a time a model's projection is hundreds of launches, each longer in coming than in
running. Here every program looks up which matrix it works on.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_search import (
    MAX_WIDTH,
    infinity,
    kth_largest,
    largest,
    on,
    one_of_few_largest,
    warps,
)

# Entries of the matrices of one chain: the list of what is near a threshold takes as many.
MOST_ENTRIES = 2**26
_FEW = 8  # the largest row minimum that is found one entry after the other
_SAMPLE = tl.constexpr(8192)
_BINS = tl.constexpr(2048)  # of one digit of the search among the listed entries
_DIGIT = tl.constexpr(11)  # their logarithm
_ALL = tl.constexpr(2**31 - 1)
# What is fixed of a matrix, in int64: its address, entries, columns, whether rows have a minimum
# (1: rows of the matrix, 2: its columns), the first one's place among all limits, its
# first block and its blocks, how far apart the entries of the sample are, and the row minimum.
_AT, _N, _WIDTH, _KIND, _FIRST_ROW, _FIRST_BLOCK, _BLOCKS, _STRIDE, _MINIMUM, _FACTS = (
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


@dataclass(frozen=True)
class _Matrix:
    """What a chain has to know of a matrix, apart from its budget."""

    address: int
    rows: int
    columns: int
    minimum: int
    row_dim: int

    @property
    def entries(self) -> int:
        return self.rows * self.columns

    @property
    def neurons(self) -> int:
        """Rows that have a minimum."""
        return (self.rows, self.columns)[self.row_dim] if self.minimum else 0

    @property
    def length(self) -> int:
        """Of such a row."""
        return (self.columns, self.rows)[self.row_dim]


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

        A small sample brackets the threshold. One pass counts what lies above the bracket and lists
        what lies within. The threshold is found on that list, digit by digit, and a last pass
        zeroes what is below it. If the sample misled, the other side is listed as well.

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
        chains: dict[torch.dtype, list[list[int]]] = {}
        for i, matrix in enumerate(matrices):
            of_dtype = chains.setdefault(matrix.dtype, [[]])
            held = sum(matrices[j].numel() for j in of_dtype[-1])
            if of_dtype[-1] and held + matrix.numel() > MOST_ENTRIES:
                of_dtype.append([])
            of_dtype[-1].append(i)
        with on(device):
            for dtype, lists in chains.items():
                for members in lists:
                    facts = tuple(
                        _Matrix(matrices[i].data_ptr(), *matrices[i].shape, minima[i], row_dims[i])
                        for i in members
                    )
                    chain = _tables(facts, self.block, device)
                    self._launch(chain, dtype, tuple(budgets[i] for i in members), not_finite)
        told.copy_(not_finite, non_blocking=True)

    def _launch(
        self, chain: "_Tables", dtype: torch.dtype, budgets: tuple[int, ...], not_finite: Tensor
    ) -> None:
        device, blocks = chain.facts.device, len(chain.matrix_of_block)
        kept = chain.budgets(budgets)
        kind = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
        state = torch.zeros((len(budgets), _STATE.value), dtype=torch.int32, device=device)
        counts = torch.empty(2 * blocks, dtype=torch.int32, device=device)
        listed = torch.empty(blocks * self.block, dtype=kind, device=device)
        limits = torch.empty(2 * max(1, chain.rows), dtype=torch.int32, device=device)
        top = infinity(dtype)
        element = {2: tl.int16, 4: tl.int32}[dtype.itemsize]
        common = (chain.facts, state, limits, chain.rows, kept, largest(dtype), top)
        names = {"ELEMENT": element, "ALIGNED": chain.aligned}
        for width, (rows, first) in chain.row_tables.items():
            _row_limits[(len(rows),)](
                *common[:4], rows, first, largest(dtype), **names, FEW=chain.most_minimum <= _FEW,
                BLOCK=width, num_warps=warps(width, self.per_thread),
            )  # fmt: skip
        _bracket[(len(budgets),)](*common, **names, num_warps=16)
        names |= {"BLOCK": self.block}
        per_block = (chain.matrix_of_block, counts, listed)
        for again in (False, True):
            _list[(blocks,)](*common, *per_block, again, **names, num_warps=self.warps)
        lists = (chain.facts, state, kept, *per_block, blocks)
        for digit in range(2 if dtype.itemsize == 2 else 3):
            _count_digit[(blocks,)](*lists, top, digit, self.block, 256, num_warps=1)
        _find_cut[(blocks,)](*lists, self.block, 256, num_warps=1)
        _zero[(blocks,)](*common, chain.matrix_of_block, not_finite, **names, num_warps=self.warps)

    def _flags(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._not_finite:
            on_host = torch.zeros(2, dtype=torch.int32, pin_memory=device.type == "cuda")
            self._not_finite[device] = on_host.to(device, copy=True), on_host
        return self._not_finite[device]


class _Tables:
    """What the programs of a chain look up, on the device; made once for the same matrices.

    Attributes:
        facts: of each matrix, `(matrices, _FACTS)`.
        matrix_of_block: which matrix each program reads, int32.
        rows: with a minimum, of all matrices.
        row_tables: by the power of two that holds a row: which matrix each program's row is of, and
            the matrices' numbers before these rows, int32.
        aligned: whether addresses and sizes allow wide loads.
    """

    def __init__(self, matrices: Sequence[_Matrix], block: int, device: torch.device) -> None:
        facts, owners, self.rows = [], [], 0
        by_width: dict[int, tuple[list[Tensor], list[Tensor]]] = {}
        for i, matrix in enumerate(matrices):
            n, width = matrix.entries, matrix.columns
            stride = max(1, n // _SAMPLE.value)
            while math.gcd(stride, width) != 1:  # so that every column is visited
                stride += 1
            kind = (1 + matrix.row_dim) if matrix.minimum else 0
            blocks = triton.cdiv(n, block)
            facts.append([
                matrix.address, n, width, kind, self.rows, len(owners), blocks, stride,
                min(matrix.minimum, matrix.length),
            ])  # fmt: skip
            owners += [i] * blocks
            if kind:
                power = triton.next_power_of_2(matrix.length)
                tables = by_width.setdefault(power, ([], []))
                tables[0].append(torch.full((matrix.neurons,), i, dtype=torch.int32))
                tables[1].append(torch.arange(matrix.neurons, dtype=torch.int32))
            self.rows += matrix.neurons
        self.facts = torch.tensor(facts, dtype=torch.int64).to(device)
        self.matrix_of_block = torch.tensor(owners, dtype=torch.int32).to(device)
        self.row_tables = {
            power: (torch.cat(owner).to(device), torch.cat(number).to(device))
            for power, (owner, number) in by_width.items()
        }
        self.most_minimum = max(matrix.minimum for matrix in matrices)
        self.aligned = all(m.address % 16 == 0 and m.entries % 16 == 0 for m in matrices)
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
def _tables(matrices: tuple[_Matrix, ...], block: int, device: torch.device) -> _Tables:
    return _Tables(matrices, block, device)


@triton.jit
def _fact(facts, matrix, name: tl.constexpr):
    return tl.load(facts + matrix * _FACTS + name)


@triton.jit
def _entries(facts, matrix, ELEMENT: tl.constexpr, ALIGNED: tl.constexpr):
    """Where a matrix is, and how many entries it has."""
    address = _fact(facts, matrix, _AT)
    n = _fact(facts, matrix, _N).to(tl.int32)
    bits = address.to(tl.pointer_type(ELEMENT))
    if ALIGNED:
        bits = tl.multiple_of(bits, 16)
        n = tl.multiple_of(n, 16)
    return bits, n


@triton.jit(do_not_specialize=["all_rows"])
def _row_limits(
    facts, state, limits, all_rows, matrix_of, row_of, LARGEST: tl.constexpr,
    ELEMENT: tl.constexpr, ALIGNED: tl.constexpr, FEW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The magnitude that the k largest nonzeros of a row reach, and the last of equals kept."""
    matrix = tl.load(matrix_of + tl.program_id(0))
    row = tl.load(row_of + tl.program_id(0))
    bits, n = _entries(facts, matrix, ELEMENT, ALIGNED)
    width = _fact(facts, matrix, _WIDTH).to(tl.int32)
    by_row = _fact(facts, matrix, _KIND) == 1
    k = _fact(facts, matrix, _MINIMUM).to(tl.int32)
    length = tl.where(by_row, width, n // width)
    step = tl.where(by_row, 1, width)
    column = tl.arange(0, BLOCK)
    inside = column < length
    at = row * tl.where(by_row, width, 1) + column * step
    a = tl.load(bits + at, mask=inside, other=0).to(tl.int32) & LARGEST
    a = tl.where(inside, a, -1)
    if FEW:
        threshold, reached = one_of_few_largest(a, k)
    else:
        threshold, reached = kth_largest(a, k, 0)
    above = tl.sum((a > threshold).to(tl.int32), 0)
    last = threshold * 0 + BLOCK
    kept = threshold * 0 + k
    if threshold == 0:
        last = threshold - 1
        kept = above
    elif reached > k:
        tied = (a == threshold).to(tl.int32)
        first = (tied > 0) & (tl.cumsum(tied, 0) <= k - above)
        last = tl.max(tl.where(first, column, -1), 0)
    place = _fact(facts, matrix, _FIRST_ROW).to(tl.int32) + row
    tl.store(limits + place, threshold)
    tl.store(limits + all_rows + place, last)
    tl.atomic_add(state + matrix * _STATE + _IN_ROWS, kept, sem="relaxed")


@triton.jit
def _rest(a, row, column, inside, facts, matrix, limits, all_rows):
    """Magnitudes with 0 for those that a row minimum keeps, and which it keeps."""
    kind = _fact(facts, matrix, _KIND)
    safe = a < 0
    if kind != 0:
        neuron = tl.where(kind == 1, row, column) + _fact(facts, matrix, _FIRST_ROW).to(tl.int32)
        place = tl.where(kind == 1, column, row)
        limit = tl.load(limits + neuron, mask=inside, other=0)
        last = tl.load(limits + all_rows + neuron, mask=inside, other=0)
        safe = (a > limit) | ((a == limit) & (place <= last))
        a = tl.where(safe, 0, a)
    return a, safe


@triton.jit
def _place(start, width, BLOCK: tl.constexpr):
    """Row and column of BLOCK entries from `start` on; a division for each would take longer than
    reading them. Halves keep the quotients away from whole numbers, where rounding could tell."""
    first = start // width
    offset = start - first * width + tl.arange(0, BLOCK)
    if width >= 64:
        quotient = ((offset.to(tl.float32) + 0.5) * (1.0 / width.to(tl.float32))).to(tl.int32)
    else:
        quotient = offset // width
    return first + quotient, offset - quotient * width


@triton.jit(do_not_specialize=["all_rows"])
def _bracket(
    facts, state, limits, all_rows, budgets, LARGEST: tl.constexpr, TOP: tl.constexpr,
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
        width = _fact(facts, matrix, _WIDTH)
        row, column = (at // width).to(tl.int32), (at % width).to(tl.int32)
        a, _safe = _rest(a, row, column, at >= 0, facts, matrix, limits, all_rows)
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


@triton.jit(do_not_specialize=["all_rows"])
def _list(
    facts, state, limits, all_rows, budgets, LARGEST: tl.constexpr, TOP: tl.constexpr,
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
        row, column = _place(start, _fact(facts, matrix, _WIDTH).to(tl.int32), BLOCK)
        a, _safe = _rest(a, row, column, inside, facts, matrix, limits, all_rows)
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


@triton.jit(do_not_specialize=["all_rows"])
def _zero(
    facts, state, limits, all_rows, budgets, LARGEST: tl.constexpr, TOP: tl.constexpr,
    matrix_of, not_finite,
    ELEMENT: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Zero what is not kept; nothing if the matrix is not finite, whose shape is written down."""
    program = tl.program_id(0)
    matrix = tl.load(matrix_of + program)
    state += matrix * _STATE
    block = program - _fact(facts, matrix, _FIRST_BLOCK).to(tl.int32)
    bits, n = _entries(facts, matrix, ELEMENT, ALIGNED)
    width = _fact(facts, matrix, _WIDTH).to(tl.int32)
    if tl.load(state + _NOT_FINITE) != 0:
        if block == 0:
            tl.store(not_finite, n // width)
            tl.store(not_finite + 1, width)
    else:
        threshold = tl.load(state + _THRESHOLD)
        cut = tl.load(state + _CUT_BLOCK)
        at = block * BLOCK + tl.arange(0, BLOCK)
        inside = at < n
        values = tl.load(bits + at, mask=inside, other=0)
        row, column = _place(block * BLOCK, width, BLOCK)
        a = values.to(tl.int32) & LARGEST
        a, safe = _rest(a, row, column, inside, facts, matrix, limits, all_rows)
        keep = safe | (a > threshold) | ((a == threshold) & (block < cut))
        if block == cut:
            tied = (a == threshold).to(tl.int32)
            keep = keep | ((tied > 0) & (tl.cumsum(tied, 0) <= tl.load(state + _CUT_ROOM)))
        tl.store(bits + at, tl.where(keep, values, 0), mask=inside)
