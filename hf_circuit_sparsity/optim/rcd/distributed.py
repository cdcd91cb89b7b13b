"""Several workers that share the coordinates of one model: what they tell each other.

Every rank computes the gradient of its own part of the live coordinates and of the block, on its
own data, and ships that: never a full gradient. From then on all compute the same, so that they
stay equal bit for bit.
"""

from collections import deque
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def part_of(n: int, rank: int, size: int) -> slice:
    """Which of ``n`` coordinates, in their order, are a rank's own."""
    return slice(n * rank // size, n * (rank + 1) // size)


class Workers:
    """The ranks of a ``torch.distributed`` process group.

    Args:
        group: the process group; None for the default one.
        average_dense: whether gradients of dense parameters are averaged here; leave it False where
            ``DistributedDataParallel`` does that.

    Attributes:
        rank, size: of this process, and number of processes.
        bytes_sent: what this rank has handed over so far, dense gradients included.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, average_dense: bool = False) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.average_dense = average_dense
        self.bytes_sent = 0

    def gather(self, own: Tensor, sizes: list[int]) -> "Gathered":
        """Begin to collect what every rank has, ``(sizes[rank],)`` each, in the order of ranks."""
        padded = own.new_zeros(max(1, *sizes))
        padded[: len(own)] = own
        found = [torch.empty_like(padded) for _ in sizes]
        work = dist.all_gather(found, padded, group=self.group, async_op=True)
        self.bytes_sent += own.numel() * own.element_size()
        return Gathered(work, found, sizes)

    def gather_unequal(self, own: Tensor) -> list[Tensor]:
        """Collect tensors of lengths the others do not know."""
        count = torch.tensor([len(own)], device=own.device)
        counts = self.gather(count, [1] * self.size).wait()
        return self.gather(own, [int(c) for c in counts]).wait()

    def average(self, gradients: list[Tensor]) -> None:
        """Average gradients over the ranks, in place."""
        if not gradients:
            return
        flat = torch.cat([g.flatten() for g in gradients])
        total = torch.stack(self.gather(flat, [len(flat)] * self.size).wait()).sum(0) / self.size
        for g, part in zip(gradients, total.split([g.numel() for g in gradients]), strict=True):
            g.copy_(part.view(g.shape))


class Gathered:
    """A collection under way."""

    def __init__(self, work: Any, found: list[Tensor], sizes: list[int]) -> None:
        self._work, self._found, self._sizes = work, found, sizes

    def wait(self) -> list[Tensor]:
        """What each rank had."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return [x[:n] for x, n in zip(self._found, self._sizes, strict=True)]


class GradientExchange:
    """Gradients at live coordinates on their way from all ranks to all ranks.

    Args:
        workers: None for a single process, which only delays.
        staleness: how many steps after they were computed gradients are used.
    """

    def __init__(self, workers: Workers | None, staleness: int) -> None:
        self.workers, self.staleness = workers, staleness
        self._under_way: deque = deque()

    def clear(self) -> None:
        """Forget what is under way."""
        self._under_way.clear()

    def send(self, own: dict[Tensor, Tensor], live: dict[Tensor, Tensor], scale: float) -> None:
        """Ship this rank's part.

        Args:
            own: parameter → gradient at this rank's part of ``live``.
            live: parameter → positions of all live coordinates, the same on all ranks.
            scale: to multiply the gradients by.
        """
        parts = list(own.values())
        if self.workers is None:
            gathered: Any = None
        else:
            flat = torch.cat([part.to(torch.float32) for part in parts])
            sizes = []
            for rank in range(self.workers.size):
                slices = [part_of(len(live[p]), rank, self.workers.size) for p in own]
                sizes.append(sum(s.stop - s.start for s in slices))
            gathered = self.workers.gather(flat, sizes)
        self._under_way.append((gathered, own, {p: live[p] for p in own}, scale))

    def receive(self) -> tuple[dict[Tensor, tuple[Tensor, Tensor]], float] | None:
        """The gradients whose turn it is: parameter → (positions, gradient), and their scale.

        None in the first ``staleness`` steps.
        """
        if len(self._under_way) <= self.staleness:
            return None
        gathered, own, live, scale = self._under_way.popleft()
        if gathered is None:
            return {p: (live[p], gradient) for p, gradient in own.items()}, scale
        per_rank = gathered.wait()
        size, found = len(per_rank), {}
        read = [0] * size
        for p, positions in live.items():
            pieces = []
            for rank, flat in enumerate(per_rank):
                part = part_of(len(positions), rank, size)
                n = part.stop - part.start
                pieces.append(flat[read[rank] : read[rank] + n])
                read[rank] += n
            found[p] = (positions, torch.cat(pieces))
        return found, scale


def share_births(
    workers: Workers, births: list[tuple[Tensor, Tensor, dict[str, Tensor]]]
) -> list[tuple[Tensor, Tensor, dict[str, Tensor]]]:
    """What every rank found in its part of the blocks, together, positions ascending.

    Args:
        births: per parameter: positions, values and moments of its candidates.
    """
    if not births:
        return []
    device = births[0][0].device
    lengths = torch.tensor([len(index) for index, _, _ in births], device=device)
    all_lengths = workers.gather(lengths, [len(births)] * workers.size).wait()
    index = torch.cat([index for index, _, _ in births])
    columns = [torch.cat([values for _, values, _ in births])]
    names = list(births[0][2])
    columns += [torch.cat([m[name].to(columns[0].dtype) for _, _, m in births]) for name in names]
    sizes = [int(n.sum()) for n in all_lengths]
    all_index = workers.gather(index, sizes)
    all_columns = [workers.gather(column, sizes) for column in columns]
    pieces = [
        [x.split(n.tolist()) for x, n in zip(gathered.wait(), all_lengths, strict=True)]
        for gathered in (all_index, *all_columns)
    ]
    found = []
    for i in range(len(births)):
        positions, values, *moments = (torch.cat([rank[i] for rank in kind]) for kind in pieces)
        order = positions.argsort()
        own = {
            name: m[order].to(births[i][2][name].dtype)
            for name, m in zip(names, moments, strict=True)
        }
        found.append((positions[order], values[order], own))
    return found
