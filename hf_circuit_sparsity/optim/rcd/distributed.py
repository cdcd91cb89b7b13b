"""Several processes that share the coordinates of one model.

Every process computes the gradient of its own part of the active coordinates and of the block, on
its own data, and ships that: never a full gradient. From then on all compute the same, so that they
stay equal bit for bit.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...modeling.sparse_layers import sparse_layers

Gathering = Callable[[], list[Tensor]]


@dataclass
class Growth:
    """Zeros of a block that may become active: positions, values, and moments of each."""

    positions: Tensor
    values: Tensor
    moments: dict[str, Tensor]


def part_of(n: int, rank: int, size: int) -> slice:
    """Which of `n` coordinates, in their order, are a rank's own."""
    return slice(n * rank // size, n * (rank + 1) // size)


class RCDProcessGroup:
    """The ranks of a `torch.distributed` process group.

    Args:
        group: the process group; None for the default one.
        average_dense: whether gradients of dense parameters are averaged here; leave it False where
            `DistributedDataParallel` does that.

    Attributes:
        rank, size: of this process, and number of processes.
        bytes_sent: what this rank has handed over so far, dense gradients included.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, average_dense: bool = False) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.average_dense = average_dense
        self.bytes_sent = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> "RCDProcessGroup":
        return self  # a copy of an optimizer works with the same processes

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "an optimizer that works with several processes was pickled, but what connects them "
            "exists in this one only: save its state_dict() and build it anew."
        )

    def gather(self, own: Tensor, sizes: list[int]) -> Gathering:
        """Begin to collect what every rank has, `(sizes[rank],)` each.

        Returns:
            What waits for it and returns it, in the order of ranks.
        """
        padded = own.new_zeros(max(1, *sizes))
        padded[: len(own)] = own
        received = [torch.empty_like(padded) for _ in sizes]
        work = dist.all_gather(received, padded, group=self.group, async_op=True)
        self.bytes_sent += own.numel() * own.element_size()

        def wait() -> list[Tensor]:
            work.wait()
            return [x[:n] for x, n in zip(received, sizes, strict=True)]

        return wait

    def average(self, gradients: list[Tensor]) -> None:
        """Average gradients over the ranks, in place."""
        if not gradients:
            return
        flat = torch.cat([g.flatten() for g in gradients])
        total = torch.stack(self.gather(flat, [len(flat)] * self.size)()).sum(0) / self.size
        for g, part in zip(gradients, total.split([g.numel() for g in gradients]), strict=True):
            g.copy_(part.view(g.shape))

    def share(self, own: list[Growth]) -> list[Growth]:
        """Put together what every rank found in its part of the blocks, positions ascending.

        Args:
            own: per parameter, what this rank found.
        """
        if not own:
            return []
        lengths = torch.tensor([len(g.positions) for g in own], device=own[0].values.device)
        all_lengths = self.gather(lengths, [len(own)] * self.size)()
        sizes = [int(n.sum()) for n in all_lengths]
        names, dtype = list(own[0].moments), own[0].values.dtype
        columns = [torch.cat([g.positions for g in own]), torch.cat([g.values for g in own])]
        columns += [torch.cat([g.moments[name].to(dtype) for g in own]) for name in names]
        gathered = [self.gather(column, sizes) for column in columns]
        pieces = [
            [x.split(n.tolist()) for x, n in zip(column(), all_lengths, strict=True)]
            for column in gathered
        ]
        shared = []
        for i, growth in enumerate(own):
            positions, values, *moments = (torch.cat([rank[i] for rank in kind]) for kind in pieces)
            order = positions.argsort()
            by_name = {
                name: moment[order].to(growth.moments[name].dtype)
                for name, moment in zip(names, moments, strict=True)
            }
            shared.append(Growth(positions[order], values[order], by_name))
        return shared


class GradientExchange:
    """Gradients at active coordinates on their way from all processes to all processes.

    Args:
        process_group: None for a single process, which only delays.
        staleness: how many steps after they were computed gradients are used.
    """

    def __init__(self, process_group: RCDProcessGroup | None, staleness: int) -> None:
        self.process_group, self.staleness = process_group, staleness
        self._in_flight: deque = deque()

    def swap(
        self, own: dict[Tensor, Tensor], positions: dict[Tensor, Tensor]
    ) -> dict[Tensor, tuple[Tensor, Tensor]]:
        """Ship this rank's part of the gradients, and take those whose turn it is.

        Args:
            own: parameter → gradient at this rank's part of its active coordinates, scaled.
            positions: parameter → all active coordinates, the same on all ranks.

        Returns:
            Parameter → (positions, gradient); empty in the first `staleness` steps.
        """
        sent: Any = list(own.values())
        if self.process_group is not None and own:
            flat = torch.cat([gradient.to(torch.float32) for gradient in sent])
            sizes = []
            for rank in range(self.process_group.size):
                parts = [part_of(len(positions[p]), rank, self.process_group.size) for p in own]
                sizes.append(sum(part.stop - part.start for part in parts))
            sent = self.process_group.gather(flat, sizes)
        self._in_flight.append((sent, positions))
        if len(self._in_flight) <= self.staleness:
            return {}
        arrived, positions = self._in_flight.popleft()
        if callable(arrived):
            arrived = self._by_parameter(arrived(), list(positions.values()))
        return dict(zip(positions, zip(positions.values(), arrived, strict=True), strict=True))

    def _by_parameter(self, per_rank: list[Tensor], positions: list[Tensor]) -> list[Tensor]:
        pieces = []
        for rank, flat in enumerate(per_rank):
            parts = [part_of(len(active), rank, len(per_rank)) for active in positions]
            pieces.append(flat.split([part.stop - part.start for part in parts]))
        return [torch.cat(of_one) for of_one in zip(*pieces, strict=True)]


@torch.no_grad()
def leave_to_process_group(model: nn.Module, sparse: set[str]) -> None:
    """Keep DDP from summing full gradients of sparse parameters, and make all ranks begin alike."""
    model._ddp_params_and_buffers_to_ignore = sorted(sparse)
    for name in sorted(sparse):
        dist.broadcast(model.get_parameter(name).data, 0)
    for _, layer in sorted(sparse_layers(model).items()):
        dist.broadcast(layer.columns, 0)
        dist.broadcast(layer.row_starts, 0)
        layer._pattern = None
