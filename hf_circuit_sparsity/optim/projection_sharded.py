"""The magnitude projection of matrices whose rows are spread over processes: exact as on one.

The bits of a non-negative float, read as an integer, sort like the float. So the magnitude of the
last entry that is kept is found digit by digit, by a radix search: how many entries have which
leading digit is counted here and summed over the processes; the digit is chosen, and the next one
is looked at among the entries that share it. Float32 takes three sums (digits of 11, 11 and 9
bits), half precision two, float64 six, of all matrices together: 8 KB per sum and matrix, whatever
its size. One more message says how many entries equal to the last one each process has, since those
of lower rank, whose rows come first, win. What rows keep in any case is local, as rows are whole.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ..kernels.cpu import compiled_kernels
from .keep_largest import (
    INTEGER_VIEW,
    infinity_bits,
    not_finite,
    positions_of,
    take_leaders_,
)
from .projection_cpu import zero_below_
from .sharding import local, shard_group

_DIGIT = 11  # bits at most; its counts, four bytes each, are 8 KB
# Entries looked at at once on a CPU: 256 KB of float32, which stay in its cache.
_PIECE = 1 << 16


def project_sharded_each_(
    weights: Sequence[Tensor],
    budgets: Sequence[int],
    minima: Sequence[int],
    row_dims: Sequence[int],
) -> None:
    """`project_topk_each_` of `DTensor`s sharded on dimension 0, rows whole.

    All processes that hold parts of the weights have to call it, in the same order.

    Raises:
        ValueError: on all processes, if a weight holds NaN or infinity anywhere; none of those on
            the same processes has been changed then.
    """
    together: dict[tuple, list[tuple[Tensor, int, int]]] = {}
    for weight, k, min_nonzeros, _ in zip(weights, budgets, minima, row_dims, strict=True):
        kind = shard_group(weight), weight.device, weight.dtype
        together.setdefault(kind, []).append((weight, k, min_nonzeros))
    for (group, _, _), members in together.items():
        _project_alike_(members, group)


def _project_alike_(members: list[tuple[Tensor, int, int]], group: dist.ProcessGroup) -> None:
    """Of one dtype, on one device, and spread over the same processes."""
    dtype = members[0][0].dtype
    top, shifts = infinity_bits(dtype), _shifts(dtype)
    leaders, rests, broken = [], [], []
    for weight, _, min_nonzeros in members:
        shard = local(weight)
        bits, found = _magnitudes(shard), torch.empty(0, dtype=torch.int64, device=shard.device)
        if min_nonzeros:
            found = take_leaders_(bits.flatten(1), min_nonzeros)
        leaders.append(found)
        rests.append(bits.view(-1))
        broken.append((_magnitudes(shard.reshape(-1)[found]) >= top).sum())
    # One of 2³¹ entries or more is rare, and would double what is sent.
    count = torch.int32 if max(w.numel() for w, _, _ in members) < 2**31 else torch.int64
    need = torch.tensor([k for _, k, _ in members], device=rests[0].device)
    last = torch.zeros_like(need)  # the magnitude of the last one that is kept, as far as found
    candidates, above = rests, torch.iinfo(INTEGER_VIEW[dtype]).bits - 1
    for shift in shifts:
        size = 1 << (above - shift)
        own = torch.stack([_histogram(c, shift, size) for c in candidates])
        if candidates is rests:
            kept = torch.tensor([len(found) for found in leaders], device=own.device)
            message = torch.cat([own, kept[:, None], torch.stack(broken)[:, None]], 1).to(count)
            dist.all_reduce(message, group=group)
            counts, (kept, broken) = message[:, :size].long(), message[:, size:].long().unbind(1)
            broken += counts[:, top >> shift :].sum(1)
            if broken.any():
                raise not_finite(members[int(broken.argmax())][0].shape)
            need = (need - kept).clamp(min=0)
        else:
            counts = own.to(count)
            dist.all_reduce(counts, group=group)
            counts = counts.long()
        # The largest digit that as many entries reach as are still to be kept.
        reach = counts.flip(1).cumsum(1).flip(1)
        digit = (reach >= need[:, None]).sum(1, keepdim=True) - 1
        need -= (reach - counts).gather(1, digit).squeeze(1)
        last |= digit.squeeze(1) << shift
        candidates = [
            c[positions_of((c >= low) & (c <= low + (1 << shift) - 1))]
            for c, low in zip(candidates, last.tolist(), strict=True)
        ]
        above = shift
    # Of those equal to the last one the first are kept, ranks in order.
    ties = own.gather(1, digit).squeeze(1)
    every = [torch.empty_like(ties) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, ties, group=group)
    before = torch.stack(every)[: dist.get_rank(group)].sum(0)
    room = (need - before).clamp(min=0)
    found = zip(members, leaders, rests, last.tolist(), room.tolist(), ties.tolist(), strict=True)
    for (weight, _, _), leading, rest, threshold, space, equal in found:
        shard = local(weight)
        flat = shard.reshape(-1)
        safe = flat[leading]
        if flat.device.type == "cpu" and threshold:
            zero_below_(flat, min(threshold, top), compiled_kernels(flat))
        elif threshold:
            flat.masked_fill_(rest < threshold, 0.0)
        if space < equal:
            flat[positions_of(rest == threshold)[space:]] = 0.0
        flat[leading] = safe
        if not shard.is_contiguous():
            shard.copy_(flat.view(shard.shape))


def _shifts(dtype: torch.dtype) -> list[int]:
    """Where each digit of a magnitude ends, from the first to the last."""
    bits = torch.iinfo(INTEGER_VIEW[dtype]).bits - 1
    n = -(-bits // _DIGIT)
    width = -(-bits // n)
    return [max(0, bits - width * (i + 1)) for i in range(n)]


def _histogram(magnitude: Tensor, shift: int, size: int) -> Tensor:
    """How many of `(n,)` have which digit, one of `size`, that ends at bit `shift`."""
    if magnitude.device.type != "cpu":
        return torch.bincount((magnitude >> shift) & (size - 1), minlength=size)
    counts = torch.zeros(size, dtype=torch.int64)
    for piece in magnitude.split(_PIECE):
        counts += torch.bincount((piece >> shift) & (size - 1), minlength=size)
    return counts


def _magnitudes(weight: Tensor) -> Tensor:
    """A copy of the bits of a tensor without the signs, as integers that sort like them."""
    integers = INTEGER_VIEW[weight.dtype]
    return weight.detach().contiguous().view(integers) & torch.iinfo(integers).max
