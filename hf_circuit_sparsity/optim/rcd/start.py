"""What is looked at before the first step of a run, or of one that is taken up again."""

import hashlib
import logging
from typing import Any

import torch
from torch import Tensor

from ...kernels.cpu import compiled_kernels
from ..projection import nonzero_budget
from .distributed import RCDProcessGroup
from .state import SparseState

logger = logging.getLogger(__name__)


def digest(groups: list[dict[str, Any]], states: dict[Tensor, Any]) -> bytes:
    """A digest of weights, their positions, moments and settings, of equal length for all.

    Args:
        groups: parameter groups.
        states: parameter → its [`SparseState`], or a dict with its moments.
    """
    found = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            value = value.detach().contiguous().flatten().view(torch.uint8).cpu().numpy()
            found.update(value.data)
        else:
            found.update(repr(value).encode())

    for group in groups:
        for name in sorted(group):
            if name != "params":
                add((name, group[name]))
        for p in group["params"]:
            add(p)
            state = states.get(p) or {}
            state = state.to_dict() if isinstance(state, SparseState) else state
            for name in sorted(state):
                # What a block has seen is every rank's own.
                if name not in ("block_sum", "block_square", "seen"):
                    add(state[name])
    return found.digest()


def warn_of_row_minima(states: list[tuple[dict[str, Any], SparseState]]) -> None:
    """Say once where the rows' minimum of nonzeros is more than the budget."""
    larger = []
    for group, state in states:
        if group["density"] is None or not state.is_matrix:
            continue
        rows = state.shape[group["row_dim"]]
        width = state.shape[1 - group["row_dim"]]
        least = rows * min(group["min_nonzeros"], width)
        budget = nonzero_budget(state.numel, group["density"])
        if least > budget:
            larger.append((group, state, least, budget))
    if larger:
        group, state, least, budget = larger[0]
        logger.warning(
            "min_nonzeros=%d keeps %d nonzeros in a matrix of %d × %d, target_density leaves it %d "
            "(and likewise %d of %d sparse parameters): the minimum holds; lower min_nonzeros to "
            "stay within the density.",
            group["min_nonzeros"], least, *state.shape, budget, len(larger), len(states),
        )  # fmt: skip


def computed_by(process_group: RCDProcessGroup | None, parameter: Tensor) -> dict[str, Any]:
    """What the rounding of a run depends on, beside its settings."""
    return {
        "processes": 1 if process_group is None else process_group.size,
        "compiled kernels": compiled_kernels(parameter.detach()) is not None,
        "device": parameter.device.type,
    }


def warn_of_other_rounding(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Say what will make a run that is taken up another than if it had not been interrupted."""
    changed = [
        f"{name} {before[name]}, now {now[name]}"
        for name in before
        if name in now and before[name] != now[name]
    ]
    if changed:
        logger.warning(
            "The optimizer was saved by a run with %s: gradients are rounded otherwise, or are of "
            "other data, and after some steps other coordinates are chosen than without the "
            "interruption.",
            "; ".join(changed),
        )
