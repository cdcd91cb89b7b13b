"""Several processes that share the coordinates of one model.

Every process computes the gradient of its own part of the active coordinates and of the block, on
its own data, and ships that: never a full gradient. From then on all compute the same, so that they
stay equal bit for bit.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


class LostRankError(RuntimeError):
    """Another process of the run is gone, or cannot be reached any more."""


class RCDProcessGroup:
    """The ranks of a `torch.distributed` process group.

    Args:
        group: the process group; None for the default one.
        average_dense: whether gradients of dense parameters are averaged here; leave it False where
            `DistributedDataParallel` does that.

    Attributes:
        rank, size: of this process, and number of processes.
        bytes_sent: what this rank has handed over so far, dense gradients included.

    What its methods return raises [`LostRankError`] once another rank is gone.
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
        with self._connected():
            work = dist.all_gather(received, padded, group=self.group, async_op=True)
        self.bytes_sent += own.numel() * own.element_size()

        def wait() -> list[Tensor]:
            with self._connected():
                work.wait()
            return [x[:n] for x, n in zip(received, sizes, strict=True)]

        return wait

    def average(self, own: Tensor) -> Callable[[], Tensor]:
        """Begin to average a tensor over the ranks.

        Returns:
            What waits for it and returns it.
        """
        total = own.clone()
        with self._connected():
            work = dist.all_reduce(total, group=self.group, async_op=True)
        self.bytes_sent += own.numel() * own.element_size()

        def wait() -> Tensor:
            with self._connected():
                work.wait()
            return total / self.size

        return wait

    def check_alike(self, digest: bytes, device: torch.device) -> None:
        """Raise ValueError on every rank unless all have the same digest of what they begin with.

        Args:
            digest: of the same length on all ranks.
            device: through which the ranks talk.
        """
        own = torch.frombuffer(bytearray(digest), dtype=torch.uint8).to(device)
        gathered = self.gather(own, [len(own)] * self.size)()
        others = [rank for rank, x in enumerate(gathered) if not torch.equal(x, gathered[0])]
        if others:
            raise ValueError(
                f"rank {', '.join(map(str, others))} begins with other weights, optimizer state or "
                "settings than rank 0, and ranks that share coordinates must be equal: load the "
                "same checkpoint, or seed the model and the optimizer alike, on every rank."
            )

    @contextmanager
    def _connected(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise LostRankError(
                f"rank {self.rank} lost the connection to some other of the {self.size} ranks "
                f"({reason}), and none goes on alone: start again with the ranks that are left, "
                "from the last checkpoint, or from this model and optimizer, which can be saved."
            ) from error


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
