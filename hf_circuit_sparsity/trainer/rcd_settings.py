"""The settings of :class:`RCDSparseOptimizer`, checked."""

import math
from typing import Any

from .coordinate_blocks import BLOCK_KINDS, SELECTIONS

UPDATES = ("adam", "plain")
# In (0, 1].
_SHARES = ("block_fraction", "greedy_fraction", "magnitude_floor")
_NOT_NEGATIVE = ("lr", "eps", "weight_decay", "clip_threshold", "l1", "magnitude_power")


def check_group(group: dict[str, Any]) -> None:
    """Check the settings and the parameters of a parameter group.

    Raises:
        ValueError: one sentence that names the setting, or the parameter that fits no rule.
    """
    for name, known in (("selection", SELECTIONS), ("block", BLOCK_KINDS), ("update", UPDATES)):
        if group[name] not in known:
            raise ValueError(
                f"{name}={group[name]!r} is unknown: expected one of {', '.join(known)}."
            )
    for name in _SHARES:
        if not _is_number(group[name]) or not 0.0 < group[name] <= 1.0:
            raise ValueError(
                f"{name}={group[name]!r} is outside (0, 1]: pass a share, for example 1/16."
            )
    target = group["target_density"]
    if target is not None and not (_is_number(target) and 0.0 < target <= 1.0):
        raise ValueError(
            f"target_density={target!r} is outside (0, 1]: pass the share of weights that may be "
            "nonzero, or None for no budget."
        )
    for name in _NOT_NEGATIVE:
        if not 0.0 <= float(group[name]) < math.inf:
            raise ValueError(f"{name}={group[name]!r} is not a finite number >= 0.")
    if not all(0.0 <= beta < 1.0 for beta in group["betas"]):
        raise ValueError(f"betas={group['betas']!r} are not both in [0, 1).")
    for name, least in (("block_steps", 1), ("min_nonzeros", 0)):
        value = group[name]
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name}={value!r} is not a whole number >= {least}.")
    if group["row_dim"] not in (0, 1):
        raise ValueError(f"row_dim={group['row_dim']!r} is neither 0 (nn.Linear) nor 1 (Conv1D).")
    for i, p in enumerate(group["params"]):
        names = group.get("param_names")
        name = names[i] if names else f"parameter {i}"
        described = f"{name} ({p.dtype}, shape {tuple(p.shape)})"
        if not p.is_floating_point():
            raise ValueError(f"{described} is not a floating-point tensor: leave it out.")
        if not group["sparse"]:
            continue
        if not p.is_contiguous() or p.numel() == 0:
            raise ValueError(
                f"{described} is {'empty' if p.numel() == 0 else 'not contiguous'}, so it cannot "
                "be sparse: leave it out, or put it into a group with sparse=False."
            )
        if group["row_dim"] == 1 and p.ndim > 2:
            raise ValueError(
                f"{described} has no rule: row_dim=1 is for matrices stored as inputs × outputs "
                "(Conv1D); pass row_dim=0 or put it into a group with sparse=False."
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
