"""What the processes of a run tell each other in a step, and what of it is used when.

With a staleness of s everything is used later than it was sent, so that a process goes on while it
is on its way: gradients s steps, and what grows 2 s steps, as the numbers of what every process
found travel ahead of it. Without staleness nothing waits in a queue.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .distributed import Growth, RCDProcessGroup, part_of
from .state import SparseState


@dataclass
class Gradients:
    """The gradients that a step uses, of all processes, not scaled.

    Attributes:
        states: the sparse parameters that have one.
        positions: per state, of the coordinates that were active when it was computed, ascending.
        active: per state, the gradient at them; None where nonzeros outside the block do not move.
        in_block: sum of squares over the block (without its active coordinates, where their
            gradient is known), and number of the entries it is over, `(len(states), 2)` float64.
        dense: parameter → its whole gradient.
    """

    states: list[SparseState]
    positions: list[Tensor]
    active: list[Tensor | None]
    in_block: Tensor
    dense: dict[Tensor, Tensor]


class Exchange:
    """Gradients and growth on their way from all processes to all processes.

    All processes call its methods in the same order, for the same parameters.

    Args:
        process_group: None for a single process, which only delays.
        staleness: how many steps after they were computed gradients are used.
        averages: whether every process has the gradient at all active coordinates and these are
            averaged, instead of each having its own part of them.
    """

    def __init__(
        self, process_group: RCDProcessGroup | None, staleness: int, averages: bool = False
    ) -> None:
        self.process_group, self.staleness, self.averages = process_group, staleness, averages
        self._gradients: deque[Callable[[], Gradients]] = deque()
        # None for a step in which no block's stay ended.
        self._lengths: deque[Callable[[], Any] | None] = deque()
        self._growths: deque[Callable[[], dict[SparseState, Growth]] | None] = deque()

    def swap_gradients(
        self, states: list[SparseState], dense: dict[Tensor, Tensor]
    ) -> Gradients | None:
        """Send this process's gradients of a step, and take those whose turn it is.

        Args:
            states: those that have a gradient.
            dense: parameter → its whole gradient.

        Returns:
            None in the first `staleness` steps.
        """
        positions = [state.active for state in states]
        active = [state.gradient[0] for state in states]
        in_block = torch.tensor(
            [_block_square(state) for state in states],
            dtype=torch.float64,
            device=states[0].parameter.device if states else None,
        ).view(-1, 2)
        active_later = self._send_active(active, positions)
        in_block_later = self._send_sums(in_block)
        dense_later = self._send_dense(dense)

        def arrived() -> Gradients:
            return Gradients(states, positions, active_later(), in_block_later(), dense_later())

        if not self.staleness:
            return arrived()
        self._gradients.append(arrived)
        if len(self._gradients) <= self.staleness:
            return None
        return self._gradients.popleft()()

    def swap_growth(self, own: dict[SparseState, Growth]) -> dict[SparseState, Growth]:
        """Send what this process found to grow, and take what grows in this step.

        Args:
            own: per parameter whose block's stay ends.

        Returns:
            What all processes found, positions ascending, for the parameters whose turn it is.
        """
        lengths = self._send_lengths(own) if own else None
        if not self.staleness:
            return {} if lengths is None else lengths()()
        self._lengths.append(lengths)
        if len(self._lengths) <= self.staleness:
            return {}
        known = self._lengths.popleft()
        self._growths.append(None if known is None else known())
        if len(self._growths) <= self.staleness:
            return {}
        arrived = self._growths.popleft()
        return {} if arrived is None else arrived()

    def _send_active(
        self, active: list[Tensor | None], positions: list[Tensor]
    ) -> Callable[[], list[Tensor | None]]:
        group = self.process_group
        if group is None or not active:
            return lambda: active
        flat = torch.cat([gradient.to(torch.float32) for gradient in active])
        if self.averages:
            averaged = group.average(flat)
            return lambda: list(averaged().split([len(at) for at in positions]))
        parts = [
            [part_of(len(at), rank, group.size) for at in positions] for rank in range(group.size)
        ]
        lengths = [[part.stop - part.start for part in of_rank] for of_rank in parts]
        gathered = group.gather(flat, [sum(of_rank) for of_rank in lengths])

        def arrived() -> list[Tensor | None]:
            pieces = [x.split(n) for x, n in zip(gathered(), lengths, strict=True)]
            return [torch.cat(of_one) for of_one in zip(*pieces, strict=True)]

        return arrived

    def _send_sums(self, sums: Tensor) -> Callable[[], Tensor]:
        group = self.process_group
        if group is None or not len(sums):
            return lambda: sums
        gathered = group.gather(sums.flatten(), [sums.numel()] * group.size)
        return lambda: torch.stack(gathered()).sum(0).view(-1, 2)

    def _send_dense(self, dense: dict[Tensor, Tensor]) -> Callable[[], dict[Tensor, Tensor]]:
        group = self.process_group
        if not dense or group is None or not group.average_dense:
            # What arrives later must not be what the coming steps write to.
            kept = {p: g.clone() for p, g in dense.items()} if self.staleness else dense
            return lambda: kept
        averaged = group.average(torch.cat([gradient.flatten() for gradient in dense.values()]))

        def arrived() -> dict[Tensor, Tensor]:
            pieces = averaged().split([g.numel() for g in dense.values()])
            return {p: x.view(p.shape).to(p.dtype) for p, x in zip(dense, pieces, strict=True)}

        return arrived

    def _send_lengths(self, own: dict[SparseState, Growth]) -> Callable[[], Any]:
        group = self.process_group
        if group is None:
            return lambda: lambda: own
        device = next(iter(own.values())).values.device
        lengths = torch.tensor([len(g.positions) for g in own.values()], device=device)
        gathered = group.gather(lengths, [len(own)] * group.size)
        return lambda: self._send_growth(own, gathered())

    def _send_growth(
        self, own: dict[SparseState, Growth], lengths: list[Tensor]
    ) -> Callable[[], dict[SparseState, Growth]]:
        sizes = [int(n.sum()) for n in lengths]
        found = list(own.values())
        names, dtype = list(found[0].moments), found[0].values.dtype
        columns = [torch.cat([g.positions for g in found]), torch.cat([g.values for g in found])]
        columns += [torch.cat([g.moments[name].to(dtype) for g in found]) for name in names]
        gathered = [self.process_group.gather(column, sizes) for column in columns]

        def arrived() -> dict[SparseState, Growth]:
            pieces = [
                [x.split(n.tolist()) for x, n in zip(column(), lengths, strict=True)]
                for column in gathered
            ]
            shared = {}
            for i, (state, growth) in enumerate(own.items()):
                of_one = (torch.cat([rank[i] for rank in kind]) for kind in pieces)
                positions, values, *moments = of_one
                order = positions.argsort()
                by_name = {
                    name: moment[order].to(growth.moments[name].dtype)
                    for name, moment in zip(names, moments, strict=True)
                }
                shared[state] = Growth(positions[order], values[order], by_name)
            return shared

        return arrived


def _block_square(state: SparseState) -> tuple[float, int]:
    """Sum of squares of this process's gradient in the block, and of how many entries."""
    active, block = state.gradient
    if active is None:
        return square(block), len(block)
    inside = state.active_in_block[1]
    return square(block) - square(block[inside]), len(block) - len(inside)


def square(x: Tensor) -> float:
    """Sum of squares, in float32 at least: half precision loses digits or overflows."""
    norm = torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float32))
    return norm.item() ** 2
