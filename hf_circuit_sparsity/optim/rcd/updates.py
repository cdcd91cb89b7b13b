"""How :class:`RCDSparseOptimizer` moves coordinates.

Of sparse parameters every function costs what their live coordinates and their block cost.
"""

import math
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from ..projection import nonzero_budget
from ..schedules import sharkfin
from .blocks import Block, draw_block
from .distributed import Workers, part_of
from .pattern import LivePattern, keep_largest, places
from .storage import Storage

_MOMENTS = ("exp_avg", "exp_avg_sq", "age")


class Coordinates:
    """The coordinates of one sparse parameter that the current step may move.

    Attributes:
        shape: of the parameter as a matrix, as stored; a vector is a column.
        live: pattern of the coordinates that are not zero.
        own_live: of those whose gradient this rank computes; with one worker, all.
        block: the chosen ones, live or not, of this rank.
        move_live: whether the live ones outside the block move as well.
    """

    def __init__(
        self, live: Tensor, block: Block, move_live: bool, workers: Workers | None = None
    ) -> None:
        self.shape = block.shape
        self.live = LivePattern(live, block.shape)
        self.workers = workers
        if workers is not None:
            own = block.ids[part_of(len(block.ids), workers.rank, workers.size)]
            block = Block(block.shape, block.dim, own)
        self.block = block
        self.move_live = move_live

    @cached_property
    def own_live(self) -> LivePattern:
        if self.workers is None:
            return self.live
        part = part_of(len(self.live.live), self.workers.rank, self.workers.size)
        return LivePattern(self.live.live[part], self.shape)

    @cached_property
    def live_in_block(self) -> tuple[Tensor, Tensor]:
        """Which of the live ones are in the block, and their places there."""
        return self.block.locate(self.live.live)


def move_live_coordinates(
    weight: Storage,
    group: dict[str, Any],
    state: dict[str, Any],
    gradient: Tensor,
    moving: Tensor | slice,
    scale: float,
) -> None:
    """Move what is live.

    Args:
        state: of the parameter, in the optimizer.
        gradient: at the live coordinates that move.
        moving: which these are.
        scale: to multiply the gradient by.
    """
    dtype = working_dtype(weight.parameter)
    gradient = gradient.to(dtype) * scale
    lr = learning_rate(group)
    step: Tensor | float = lr
    if group["update"] == "adam":
        beta1, beta2 = group["betas"]
        age = state["age"][moving] + 1
        first = state["exp_avg"][moving].lerp(gradient, 1 - beta1)
        second = state["exp_avg_sq"][moving].lerp(gradient.square(), 1 - beta2)
        for name, moved in zip(_MOMENTS, (first, second, age), strict=True):
            state[name][moving] = moved
        gradient = first / (1 - beta1**age)
        step = lr / ((second / (1 - beta2**age)).sqrt() + group["eps"])
    x = weight.read(state["live"])[moving].to(dtype)
    x = x * (1 - lr * group["weight_decay"]) - step * gradient
    weight.write(state["live"], moving, shrink(x, step, group))


def remember_block(
    weight: Storage, state: dict[str, Any], block_gradient: Tensor, scale: float
) -> None:
    """Add the block's gradient to what is remembered of its stay.

    Args:
        block_gradient: at the coordinates of the block.
        scale: to multiply the gradient by.
    """
    seen = block_gradient.to(working_dtype(weight.parameter)) * scale
    state["seen"] += 1
    if "block_sum" not in state:
        state["block_sum"] = seen
        return
    if "block_square" not in state:  # that of the first follows from the sum
        state["block_square"] = state["block_sum"].square()
    state["block_sum"] += seen
    state["block_square"] += seen.square()


def settle_live_coordinates(
    weight: Storage,
    group: dict[str, Any],
    state: dict[str, Any],
    wanted: Coordinates,
    births: tuple[Tensor, Tensor, dict[str, Tensor]] | None,
) -> None:
    """End of a stay: the block's zeros move, then it is settled what is live from now on.

    Args:
        births: of :func:`find_births`, of all ranks.
    """
    live = index = state["live"]
    values = weight.read(live).to(working_dtype(weight.parameter))
    moments = {name: state[name] for name in _MOMENTS if name in state}
    if births is not None:
        born, born_values, born_moments = births
        index, values = torch.cat([live, born]), torch.cat([values, born_values])
        moments = {name: torch.cat([m, born_moments[name]]) for name, m in moments.items()}
    budget, minimum, rows = len(values), 0, None
    if group["density"] is not None:
        budget = nonzero_budget(weight.numel, group["density"])
        minimum = group["min_nonzeros"] if weight.is_matrix else 0
    if minimum:
        rows = _rows(index, wanted, group)
    kept = keep_largest(values, budget, rows, minimum)
    if len(index) == len(live) and bool(kept.all()):
        return  # nothing was born, nothing died, and what is known of the pattern still holds
    order = _merged(index, len(live), kept)
    wanted.live = weight.settle(live, index[order], values[order])
    state["live"] = wanted.live.live
    state.update({name: m[order] for name, m in moments.items()})


def _merged(index: Tensor, n: int, kept: Tensor) -> Tensor:
    """The places of what is kept in ``index``, whose first ``n`` ascend, and so do the others, in
    the order in which all ascend."""
    first, second = places(kept[:n]), n + places(kept[n:])
    if not len(second):
        return first
    place = torch.searchsorted(index[first], index[second])
    place += torch.arange(len(second), device=place.device)
    order = first.new_empty(len(first) + len(second))
    others = torch.ones_like(order, dtype=torch.bool)
    others[place] = False
    order[place] = second
    order[others] = first
    return order


def draw_for(
    weight: Storage,
    group: dict[str, Any],
    state: dict[str, Any],
    fraction: float,
    generator: torch.Generator,
) -> Block:
    """The next block of a parameter, by the settings of its group."""
    return draw_block(
        weight.shape,
        block_dim(weight, group),
        fraction,
        group["selection"],
        state["draws"],
        generator,
        state["live"],
        weight.read(state["live"]),
        group["magnitude_power"],
        group["magnitude_floor"],
    )


def seeded(seed: int, ordinal: int, draw: int) -> torch.Generator:
    """The generator of one draw for one parameter."""
    key = (seed * 1_000_003 + ordinal) * 1_000_003 + draw
    return torch.Generator().manual_seed(key % (1 << 63))


def find_births(
    weight: Storage, group: dict[str, Any], state: dict[str, Any], wanted: Coordinates
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Those zeros of the block that may come alive: positions, values and moments."""
    seen = state["seen"]
    live_values = weight.read(state["live"]).to(working_dtype(weight.parameter))
    if not seen or not wanted.block.numel:
        moments = {n: state[n][:0] for n in _MOMENTS if n in state}
        return state["live"][:0], live_values[:0], moments
    place = _candidates(weight, group, state, wanted, live_values)
    mean = state["block_sum"][place] / seen
    square = state["block_square"][place] / seen if "block_square" in state else mean.square()
    step: Tensor | float = learning_rate(group)
    if group["update"] == "adam":
        step = step / (square.sqrt() + group["eps"])
    values = shrink(-step * mean, step, group)
    chosen = values != 0
    if group["selection"] == "gradient":
        count = max(1, round(wanted.block.numel * group["greedy_fraction"]))
        chosen = keep_largest(mean * chosen, count)
    chosen = places(chosen)
    moments = {}
    if group["update"] == "adam":
        # What Adam would hold, had it seen the mean of these gradients so often.
        beta1, beta2 = group["betas"]
        moments["exp_avg"] = mean[chosen] * (1 - beta1**seen)
        moments["exp_avg_sq"] = square[chosen] * (1 - beta2**seen)
        moments["age"] = torch.full_like(chosen, seen, dtype=torch.int32)
    return wanted.block.index_at(place[chosen]), values[chosen], moments


def _candidates(
    weight: Storage,
    group: dict[str, Any],
    state: dict[str, Any],
    wanted: Coordinates,
    live_values: Tensor,
) -> Tensor:
    """The places in the block of the zeros that are worth a closer look.

    Where the budget is spent, what does not outgrow the smallest live coordinate cannot take its
    place. Adam's denominator is at least the mean gradient plus epsilon, so a look at the mean
    settles this for nearly all of the block. Rows that are owed nonzeros are looked at in full.
    """
    mean, limit = state["block_sum"].abs(), 0.0
    live, sizes = state["live"], live_values.abs()
    if int(torch.count_nonzero(sizes)) < len(sizes):
        live, sizes = live[sizes > 0], sizes[sizes > 0]
    spent = group["density"] is not None and len(live) >= nonzero_budget(
        weight.numel, group["density"]
    )
    if spent:
        smallest, lr = float(sizes.min()), learning_rate(group)
        if group["update"] != "adam":
            limit = smallest / lr if lr else math.inf
        else:
            limit = smallest * group["eps"] / (lr - smallest) if lr > smallest else math.inf
    # A little less, for rounding.
    listed = mean > limit * state["seen"] * (1 - 1e-4)
    if spent and group["min_nonzeros"] and weight.is_matrix:
        rows = _rows(live, wanted, group)
        counts = torch.bincount(rows, minlength=wanted.shape[group["row_dim"]])
        listed |= wanted.block.take_rows(counts < group["min_nonzeros"], group["row_dim"]) & (
            mean > 0
        )
    listed[wanted.live_in_block[1]] = False
    return places(listed)


def _rows(index: Tensor, wanted: Coordinates, group: dict[str, Any]) -> Tensor:
    """The output neurons that coordinates belong to."""
    width = wanted.shape[1]
    return index // width if group["row_dim"] == 0 else index % width


def move_dense_parameters(
    group: dict[str, Any], state: dict[Tensor, dict[str, Any]], scale: float
) -> None:
    """Gradient descent or AdamW on the parameters of a group as a whole.

    Args:
        state: of the optimizer.
        scale: to multiply the gradients by.
    """
    params = [p for p in group["params"] if p.grad is not None]
    lr = learning_rate(group)
    if group["update"] == "plain":
        for p in params:
            p.mul_(1 - lr * group["weight_decay"]).add_(p.grad, alpha=-lr * scale)
        return
    for p in params:
        if not state[p]:
            step = torch.zeros((), dtype=torch.float32, device=p.device)
            moments = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
            state[p].update(step=step, **moments)
    states = [state[p] for p in params]
    adamw(
        params,
        [p.grad if scale == 1.0 else p.grad * scale for p in params],
        [own["exp_avg"] for own in states],
        [own["exp_avg_sq"] for own in states],
        [],
        [own["step"] for own in states],
        fused=all(p.device.type in ("cpu", "cuda") for p in params),
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=lr,
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )


def shrink(x: Tensor, step: Tensor | float, group: dict[str, Any]) -> Tensor:
    """The proximal step of the L1 penalty for steps of this size, then the zero-clip."""
    if group["l1"]:
        x = x.sign() * (x.abs() - step * group["l1"]).clamp(min=0.0)
    if group["clip_threshold"]:
        x = torch.where(x.abs() < group["clip_threshold"], 0.0, x)
    return x


def learning_rate(group: dict[str, Any]) -> float:
    """The group's, with its sharkfin factor."""
    factor = 1.0
    if group["sharkfin"] and group["density"] is not None:
        factor = sharkfin(group["density"])
    return float(group["lr"]) * factor


def working_dtype(p: Tensor) -> torch.dtype:
    """In what moments are held and steps computed: float32 at least."""
    return torch.promote_types(p.dtype, torch.float32)


def block_dim(weight: Storage, group: dict[str, Any]) -> int | None:
    """Which dimension of the stored matrix the group's blocks are cut from; see ``Block``."""
    if group["block"] == "entries" or not weight.is_matrix:
        return None
    return group["row_dim"] if group["block"] == "rows" else 1 - group["row_dim"]
