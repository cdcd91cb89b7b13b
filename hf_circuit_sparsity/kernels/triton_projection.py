"""The magnitude projection of many matrices on a GPU, in Triton, in one chain of launches.

For one matrix at a time a model's projection is hundreds of launches, each longer in coming than in
running. Here every program looks up which matrix it works on, in the tables made here.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_projection_kernels import (
    SAMPLE,
    STATE,
    bracket,
    count_digit,
    find_cut,
    list_near,
    put_back,
    set_aside,
    zero,
)
from .triton_search import INTEGER, MAX_WIDTH, infinity, largest, on, warps

# Entries of the matrices of one chain: the list of what is near a threshold takes as many.
MOST_ENTRIES = 2**26


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
        state = torch.zeros((len(budgets), STATE.value), dtype=torch.int32, device=device)
        counts = torch.empty(2 * blocks, dtype=torch.int32, device=device)
        listed = torch.empty(blocks * self.block, dtype=INTEGER[dtype.itemsize], device=device)
        aside_at = torch.empty(chain.kept_by_rows, dtype=torch.int64, device=device)
        aside = torch.empty(chain.kept_by_rows, dtype=listed.dtype, device=device)
        common = (chain.facts, state, kept, largest, top)
        for width, (matrix_of_row, row) in chain.row_tables.items():
            set_aside[(len(row),)](
                chain.facts, state, matrix_of_row, row, aside_at, aside, largest, top, **names,
                BLOCK=width, num_warps=warps(width, self.per_thread),
            )  # fmt: skip
        bracket[(len(budgets),)](*common, **names, num_warps=16)
        per_block = (chain.matrix_of_block, counts, listed)
        names["BLOCK"] = self.block
        for again in (False, True):
            list_near[(blocks,)](*common, *per_block, again, **names, num_warps=self.warps)
        lists = (chain.facts, state, kept, *per_block, blocks)
        for digit in range(2 if dtype.itemsize == 2 else 3):
            count_digit[(blocks,)](*lists, top, digit, self.block, 512, num_warps=4)
        find_cut[(blocks,)](*lists, self.block, 512, num_warps=4)
        zero[(blocks,)](
            *common[:2], largest, chain.matrix_of_block, not_finite, **names, num_warps=self.warps
        )
        if chain.kept_by_rows:
            put_back[(triton.cdiv(chain.kept_by_rows, 1024),)](
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
        facts: of each matrix, `(matrices, FACTS)`, int64.
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
            stride = max(1, n // SAMPLE.value)
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
