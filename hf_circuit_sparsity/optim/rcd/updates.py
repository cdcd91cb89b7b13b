"""How [`RCDSparseOptimizer`] measures gradients, moves coordinates, and lets them grow and drop.

Every function costs what the active coordinates and the block of a parameter cost.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..keep_largest import keep_largest, positions_of
from ..projection import nonzero_budget
from ..sparse_optimizer import learning_rate
from .distributed import Growth
from .exchange import Gradients, square
from .state import MOMENTS, SparseState


def gradient_rms(gradients: Gradients) -> float:
    """Root-mean-square over all entries of all gradients, estimated from what is known of them.

    The zeros of a block stand for all zeros of their parameter. Where no zeros are looked at any
    more, the ratio they had to the active coordinates is remembered in the parameters' states.
    """
    total, entries = 0.0, 0
    in_block = gradients.in_block.tolist()
    for state, known, (zeros_square, zeros) in zip(
        gradients.states, gradients.active, in_block, strict=True
    ):
        active, of_active = (0, 0.0) if known is None else (len(known), square(known))
        rest = state.numel - active
        if zeros and of_active > 0.0:
            ratio = zeros_square / zeros / of_active * max(1, active)
            if math.isfinite(ratio):
                before = ratio if state.zeros_ratio is None else state.zeros_ratio
                state.zeros_ratio = 0.9 * before + 0.1 * ratio
        if zeros:
            total += zeros_square * rest / zeros
        elif active:
            total += of_active / active * (state.zeros_ratio or 0.0) * rest
        total += of_active
        entries += state.numel
    for gradient in gradients.dense.values():
        total += square(gradient)
        entries += gradient.numel()
    return math.sqrt(max(0.0, total) / max(1, entries)) if math.isfinite(total) else total


def move(
    state: SparseState,
    group: dict[str, Any],
    positions: Tensor,
    gradient: Tensor | None,
    block: Tensor | None,
    scale: float,
) -> None:
    """Move those active coordinates whose gradient has come.

    Args:
        positions, gradient: active coordinates when it was computed, and their gradient, not
            scaled; see [`Gradients`].
        block: this step's gradient in the block, scaled; needed where `gradient` is None.
        scale: factor of the gradient.
    """
    if gradient is None:  # only what is in the block moves
        moving, inside = state.active_in_block
        move_active(state, group, block[inside], moving)
    elif positions is state.active:
        move_active(state, group, gradient.to(state.dtype) * scale, slice(None))
    elif len(positions):
        moving, gradient = match_stale_gradient(positions, gradient, state.active)
        move_active(state, group, gradient.to(state.dtype) * scale, moving)


def move_active(
    state: SparseState, group: dict[str, Any], gradient: Tensor, moving: Tensor | slice
) -> None:
    """Move active coordinates.

    Args:
        gradient: at those that move.
        moving: which these are.
    """
    lr = learning_rate(group)
    step: Tensor | float = lr
    if group["update"] == "adam":
        beta1, beta2 = group["betas"]
        moments = state.moments
        age = moments["age"][moving] + 1
        first = moments["exp_avg"][moving].lerp(gradient, 1 - beta1)
        second = moments["exp_avg_sq"][moving].lerp(gradient.square(), 1 - beta2)
        for name, moved in zip(MOMENTS, (first, second, age), strict=True):
            moments[name][moving] = moved
        gradient = first / (1 - beta1**age)
        step = lr / ((second / (1 - beta2**age)).sqrt() + group["eps"])
    x = state.values()[moving]
    x = x * (1 - lr * group["weight_decay"]) - step * gradient
    state.write(moving, _shrink(x, step, group))


def match_stale_gradient(
    positions: Tensor, gradient: Tensor, active: Tensor
) -> tuple[Tensor, Tensor]:
    """Select the entries of a stale gradient whose coordinates are still active.

    Args:
        positions: that were active when the gradient was computed, ascending.
        gradient: at them.
        active: positions now.

    Returns:
        Which of `active` have a gradient, as a mask, and their gradient.
    """
    index = torch.searchsorted(positions, active).clamp_(max=max(0, len(positions) - 1))
    moving = positions[index] == active
    return moving, gradient[index[moving]]


def match_stale_growth(growth: Growth, active: Tensor) -> Growth:
    """Select what of a stale growth has not become active on its way.

    Args:
        growth: positions ascending.
        active: positions now.
    """
    if not len(active):
        return growth
    index = torch.searchsorted(active, growth.positions).clamp_(max=len(active) - 1)
    new = active[index] != growth.positions
    moments = {name: moment[new] for name, moment in growth.moments.items()}
    return Growth(growth.positions[new], growth.values[new], moments)


def no_growth(state: SparseState) -> Growth:
    """Nothing that grows."""
    empty = {name: moment[:0] for name, moment in state.moments.items()}
    return Growth(state.active[:0], state.values()[:0], empty)


def replaced_share(group: dict[str, Any], steps_taken: int) -> float:
    """The share of active coordinates that are replaced at the end of a stay in this step.

    It falls as half a cosine (Evci et al. 2020, "Rigging the lottery", section 3).
    """
    share, total = group["replace_fraction"], group["total_steps"]
    if not share or total is None:
        return share
    end = group["explore_end"] * total
    return 0.5 * share * (1 + math.cos(math.pi * min(1.0, steps_taken / end))) if end else 0.0


def find_growth(
    state: SparseState,
    group: dict[str, Any],
    replaced: float,
    generator: Callable[[], torch.Generator],
) -> Growth:
    """Those zeros of this process's part of the block that may become active.

    Args:
        replaced: see [`replaced_share`].
        generator: makes the one that draws those that replace others at random.
    """
    values, seen = state.values(), state.seen
    if not seen or not state.own_block.numel:
        return no_growth(state)
    index = _candidates(state, group, values)
    mean = state.block_sum[index] / seen
    square = mean.square() if state.block_square is None else state.block_square[index] / seen
    step: Tensor | float = learning_rate(group)
    if group["update"] == "adam":
        step = step / (square.sqrt() + group["eps"])
    values = _shrink(-step * mean, step, group)
    chosen, greedy = values != 0, group["selection"] == "gradient"
    if group["replace_fraction"]:
        share = state.own_block.numel / max(1, state.drawn.numel)
        count = round(replaced * len(state.active) * share)
    else:
        count = max(1, round(state.own_block.numel * group["greedy_fraction"]))
    if greedy:
        chosen = keep_largest(mean * chosen, count)
    chosen = positions_of(chosen)
    if group["replace_fraction"] and not greedy:
        drawn = torch.randperm(len(chosen), generator=generator())[:count]
        chosen = chosen[drawn.sort().values.to(chosen.device)]
    moments = {}
    if group["update"] == "adam":
        # What Adam would hold, had it seen the mean of these gradients so often.
        beta1, beta2 = group["betas"]
        moments["exp_avg"] = mean[chosen] * (1 - beta1**seen)
        moments["exp_avg_sq"] = square[chosen] * (1 - beta2**seen)
        moments["age"] = torch.full_like(chosen, seen, dtype=torch.int32)
    return Growth(state.own_block.index_at(index[chosen]), values[chosen], moments)


def grow_and_drop(state: SparseState, group: dict[str, Any], growth: Growth) -> None:
    """End a block's stay: its zeros grow, and only the largest coordinates stay active.

    Args:
        growth: of all processes.
    """
    n = len(state.active)
    positions = torch.cat([state.active, growth.positions])
    values = torch.cat([state.values(), growth.values])
    budget, minimum, rows = len(values), 0, None
    if group["density"] is not None:
        budget = nonzero_budget(state.numel, group["density"])
        minimum = group["min_nonzeros"] if state.is_matrix else 0
    if minimum:
        rows = state.rows(positions, group["row_dim"])
    keep = keep_largest(_ranks(state, group, values, n), budget, rows, minimum)
    if len(positions) == n and bool(keep.all()):
        return  # nothing grew, nothing drops, and what is known of the pattern still holds
    order = _merged(positions, n, keep)
    moments = {
        name: torch.cat([moment, growth.moments[name]])[order]
        for name, moment in state.moments.items()
    }
    state.assign(positions[order], values[order], moments)


def _ranks(state: SparseState, group: dict[str, Any], values: Tensor, n: int) -> Tensor:
    """By what it is decided who stays: the values, but for those that are to stay in any case.

    Args:
        values: at the active coordinates, `n` of them, and at those that grow.
    """
    highest = torch.finfo(values.dtype).max
    if group["replace_fraction"]:
        values = values.clone()
        values[n:] = highest
    if group["grace_steps"] and n:
        age = state.moments["age"]
        # Those of the start are the oldest and need no grace, however long the run.
        young = age < min(group["grace_steps"], int(age.max()))
        values = torch.cat([values[:n].masked_fill(young, highest), values[n:]])
    return values


def _merged(positions: Tensor, n: int, keep: Tensor) -> Tensor:
    """Where in `positions` the kept ones are, so that they ascend.

    The first `n` positions ascend, and so do the others.
    """
    first, second = positions_of(keep[:n]), n + positions_of(keep[n:])
    if not len(second):
        return first
    at = torch.searchsorted(positions[first], positions[second])
    at += torch.arange(len(second), device=at.device)
    order = first.new_empty(len(first) + len(second))
    others = torch.ones_like(order, dtype=torch.bool)
    others[at] = False
    order[at] = second
    order[others] = first
    return order


def _candidates(state: SparseState, group: dict[str, Any], values: Tensor) -> Tensor:
    """Where in the block the zeros are that are worth a closer look.

    Where the budget is spent, what does not outgrow the smallest active coordinate cannot take its
    place. Adam's denominator is at least the mean gradient plus epsilon, so a look at the mean
    settles this for nearly all of the block. Rows below their minimum are scanned completely.

    Args:
        values: at the active coordinates.
    """
    mean, limit = state.block_sum.abs(), 0.0
    active, sizes = state.active, values.abs()
    if int(torch.count_nonzero(sizes)) < len(sizes):
        active, sizes = active[sizes > 0], sizes[sizes > 0]
    spent = group["density"] is not None and len(active) >= nonzero_budget(
        state.numel, group["density"]
    )
    if spent:
        smallest, lr = float(sizes.min()), learning_rate(group)
        if group["replace_fraction"]:
            limit = 0.0
        elif group["update"] != "adam":
            limit = smallest / lr if lr else math.inf
        else:
            limit = smallest * group["eps"] / (lr - smallest) if lr > smallest else math.inf
    # A little less, for rounding.
    listed = mean > limit * state.seen * (1 - 1e-4)
    if spent and group["min_nonzeros"] and state.is_matrix:
        row_dim = group["row_dim"]
        counts = torch.bincount(state.rows(active, row_dim), minlength=state.shape[row_dim])
        short = counts < group["min_nonzeros"]
        listed |= state.own_block.take_rows(short, row_dim) & (mean > 0)
    listed[state.active_in_block[1]] = False
    return positions_of(listed)


def _shrink(x: Tensor, step: Tensor | float, group: dict[str, Any]) -> Tensor:
    """The proximal step of the L1 penalty for steps of this size, then the zero-clip."""
    if group["l1"]:
        x = x.sign() * (x.abs() - step * group["l1"]).clamp(min=0.0)
    if group["clip_threshold"]:
        x = torch.where(x.abs() < group["clip_threshold"], 0.0, x)
    return x
