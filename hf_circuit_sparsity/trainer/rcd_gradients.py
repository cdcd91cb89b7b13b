"""How large the gradients are of which :class:`RCDSparseOptimizer` sees only a part."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .rcd_moves import Coordinates
from .rcd_workers import Workers

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


def _square(x: Tensor) -> float:
    """Sum of squares, in float32 at least: half precision loses digits or overflows."""
    norm = torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float32))
    return norm.item() ** 2
