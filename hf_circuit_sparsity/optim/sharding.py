"""Parameters of which each process holds some rows (`DTensor`s): what is here, who has the rest."""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


def local(tensor: Tensor) -> Tensor:
    """What of a tensor is in this process, sharing its memory; any other tensor is returned."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_group(tensor: Tensor) -> dist.ProcessGroup | None:
    """The processes that hold the parts of a tensor; None if all of it is here.

    With replicas (HSDP) it is those that make up the replica of this process.
    """
    sharded = _sharded_dims(tensor)
    return tensor.device_mesh.get_group(sharded[0]) if sharded else None


def _sharded_dims(tensor: Tensor) -> list[int]:
    """Along which dimensions of its mesh a tensor is cut."""
    if not isinstance(tensor, DTensor):
        return []
    return [i for i, place in enumerate(tensor.placements) if place.is_shard()]


def check_sharding(
    name: str, parameter: Tensor, sparse: bool, min_nonzeros: int, row_dim: int
) -> None:
    """Raise ValueError if a parameter is a `DTensor` that top-k cannot train."""
    if not isinstance(parameter, DTensor):
        return
    here, there = local(parameter).device.type, parameter.device_mesh.device_type
    if here != there:
        raise ValueError(
            f"{name} is offloaded (it is on {here}, its mesh on {there}), expected one that stays "
            "on its device: turn offloading off (fsdp_offload_params, CPUOffloadPolicy)."
        )
    cut = [parameter.placements[i] for i in _sharded_dims(parameter)]
    if sparse and min_nonzeros and cut and cut[0].dim != row_dim:
        raise ValueError(
            f"{name} is sharded on dimension {cut[0].dim}, which cuts its rows (row_dim={row_dim})"
            f", but min_nonzeros={min_nonzeros} was passed: pass min_nonzeros=0, or use DDP."
        )
    if len(cut) > 1 or (sparse and cut and cut[0].dim != 0):
        raise ValueError(
            f"{name} is placed as {parameter.placements}, expected to be sharded once, on "
            "dimension 0: shard it by `fully_shard` as it does without a `shard_placement_fn`."
        )


def check_ranks_agree(
    settings: dict[str, Any], group: dist.ProcessGroup | None, device: torch.device
) -> None:
    """Raise ValueError, on all processes of a group, if their settings are not the same.

    Args:
        settings: name → value, of the same names everywhere.
        group: None for all processes.
        device: where the group's collectives take place.
    """
    hashes = [hashlib.sha256(repr(value).encode()).digest()[:8] for value in settings.values()]
    numbers = [int.from_bytes(own, "little", signed=True) for own in hashes]
    own = torch.tensor(numbers, dtype=torch.int64, device=device)
    every = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, own, group=group)
    same = (torch.stack(every) == own).all(0).tolist() if every else []
    differing = [
        f"{n}={v!r}" for (n, v), alike in zip(settings.items(), same, strict=True) if not alike
    ]
    # What is not the same for one rank is not the same for any, as all compare with all.
    if differing:
        raise ValueError(
            f"rank {dist.get_rank(group)} was passed {', '.join(differing)} and another rank was "
            "not, expected the same on all ranks: pass one density schedule to all of them."
        )


def norms_over_ranks(tensors: Sequence[Tensor], own: Sequence[Tensor]) -> list[Tensor]:
    """The norms of whole tensors.

    Args:
        tensors: may be `DTensor`s.
        own: the norm of what of each is in this process, `()`.
    """
    norms = list(own)
    together: dict[dist.ProcessGroup, list[int]] = {}
    for i, tensor in enumerate(tensors):
        if (group := shard_group(tensor)) is not None:
            together.setdefault(group, []).append(i)
    for group, members in together.items():
        squares = torch.stack([norms[i] for i in members]).double().square()
        dist.all_reduce(squares, group=group)
        for i, norm in zip(members, squares.sqrt(), strict=True):
            norms[i] = norm.to(norms[i].dtype)
    return norms


def is_finite(tensor: Tensor) -> bool:
    """Whether all entries of a tensor are; of a sharded one all its processes have to ask."""
    finite = local(tensor).isfinite().all()
    group = shard_group(tensor)
    if group is not None:
        finite = finite.to(torch.int32)
        dist.all_reduce(finite, dist.ReduceOp.MIN, group=group)
    return bool(finite)
