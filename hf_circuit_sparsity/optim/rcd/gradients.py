"""What :class:`RCDSparseOptimizer` makes of gradients of which it sees only a part."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .distributed import Workers
from .updates import Coordinates

Part = tuple[int, dict[str, Any], Coordinates, Tensor | None, Tensor]


def gradient_rms(parts: list[Part], dense: Iterable[Tensor], workers: Workers | None) -> float:
    """Root-mean-square over all entries of all gradients, estimated from what there is of them.

    The zeros of a block stand for all zeros of their parameter; where none are looked at any more,
    the ratio they had to the live coordinates is remembered.

    Args:
        parts: per sparse parameter: entries, state (the ratio is kept in it), coordinates, and the
            gradient at the live coordinates (None: not known) and in the block.
        dense: whole gradients.
        workers: whose parts are put together.
    """
    found = []
    for _, _, wanted, live, block in parts:
        in_block = _square(block)
        if live is None:
            found.append((0.0, 0, in_block, len(block)))
        else:
            inside = wanted.live_in_block[1]
            zeros = len(block) - len(inside)
            found.append((_square(live), len(live), in_block - _square(block[inside]), zeros))
    if workers is not None and found:
        flat = torch.tensor(found, dtype=torch.float64).flatten()
        gathered = workers.gather(flat, [len(flat)] * workers.size).wait()
        found = torch.stack(gathered).sum(0).view(-1, 4).tolist()
    total, entries = 0.0, 0
    for (numel, state, *_), (own, alive, in_block, zeros) in zip(parts, found, strict=True):
        rest = numel - alive
        if zeros and own > 0.0:
            ratio = in_block / zeros / own * max(1, alive)
            if math.isfinite(ratio):
                state["zeros_ratio"] = 0.9 * state.get("zeros_ratio", ratio) + 0.1 * ratio
        if zeros:
            total += in_block * rest / zeros
        elif alive:
            total += own / alive * state.get("zeros_ratio", 0.0) * rest
        total += own
        entries += numel
    for gradient in dense:
        total += _square(gradient)
        entries += gradient.numel()
    return math.sqrt(max(0.0, total) / max(1, entries)) if math.isfinite(total) else total


def scale_for(rms: float, mode: str) -> float | None:
    """What to multiply gradients by whose root-mean-square this is; None if it is not finite.

    Args:
        mode: "always" brings it to 1, "clip" only from above 1, "off" leaves it alone.
    """
    if not math.isfinite(rms):
        return None
    if rms > 0.0 and (mode == "always" or (mode == "clip" and rms > 1.0)):
        return 1.0 / rms
    return 1.0


def first_not_finite(groups: list[dict[str, Any]], gradients: dict[Tensor, Any]) -> str:
    """The name of the first parameter whose gradient is not finite.

    Args:
        gradients: of sparse parameters: at the live coordinates and in the block; or None.
    """
    for number, group in enumerate(groups):
        for i, p in enumerate(group["params"]):
            found = gradients[p] if group["sparse"] else (p.grad,)
            if any(g is not None and not g.isfinite().all() for g in found or ()):
                names = group.get("param_names")
                return names[i] if names else f"parameter {i} of group {number}"
    return "no parameter alone; their squares overflow in sum"


def of_those_still_live(positions: Tensor, gradient: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
    """Which of the coordinates that live now have a late gradient, and theirs.

    Args:
        positions: that lived when the gradient was computed, ascending.
        gradient: at them.
        live: positions now.
    """
    place = torch.searchsorted(positions, live).clamp_(max=max(0, len(positions) - 1))
    moving = positions[place] == live
    return moving, gradient[place[moving]]


def _square(x: Tensor) -> float:
    """Sum of squares, in float32 at least: half precision loses digits or overflows."""
    norm = torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float32))
    return norm.item() ** 2
