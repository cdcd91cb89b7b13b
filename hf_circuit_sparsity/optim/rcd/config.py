"""The settings of :class:`RCDSparseOptimizer`, checked."""

import math
from typing import Any

from .blocks import BLOCK_KINDS, SELECTIONS

UPDATES = ("adam", "plain")
# In (0, 1].
_SHARES = ("block_fraction", "greedy_fraction", "magnitude_floor")
_NOT_NEGATIVE = ("clip_threshold", "l1", "magnitude_power")


def check_settings(settings: dict[str, Any], prefix: str = "") -> None:
    """Check the settings of a parameter group.

    Args:
        prefix: what the names of the settings begin with where they were given.

    Raises:
        ValueError: one sentence that names the setting.
    """
    for name, known in (("selection", SELECTIONS), ("block", BLOCK_KINDS), ("update", UPDATES)):
        if settings[name] not in known:
            raise ValueError(
                f"{prefix}{name}={settings[name]!r} is unknown: expected one of {', '.join(known)}."
            )
    for name in _SHARES:
        if not _is_number(settings[name]) or not 0.0 < settings[name] <= 1.0:
            raise ValueError(
                f"{prefix}{name}={settings[name]!r} is outside (0, 1]: pass a share, for example "
                "1/16."
            )
    for name in _NOT_NEGATIVE:
        value = settings[name]
        if not _is_number(value) or not 0.0 <= value < math.inf:
            raise ValueError(f"{prefix}{name}={value!r} is not a finite number >= 0.")
    steps = settings["block_steps"]
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"{prefix}block_steps={steps!r} is not a whole number >= 1.")


def check_schedule(
    target: float | None,
    start: float | None,
    anneal_end: float,
    explore_end: float,
    total_steps: int | None,
    prefix: str = "",
) -> None:
    """Check how budget and exploration change over a run.

    Raises:
        ValueError: one sentence that names the setting.
    """
    if start is not None:
        if target is None:
            raise ValueError(
                f"{prefix}start_density={start!r} was passed without a target_density for it to "
                "fall to: pass both."
            )
        if not _is_number(start) or not target <= start <= 1.0:
            raise ValueError(
                f"{prefix}start_density={start!r} is not between target_density={target!r} and 1: "
                "the budget can only fall."
            )
    for name, value in (("anneal_end", anneal_end), (f"{prefix}explore_end", explore_end)):
        if not _is_number(value) or not 0.0 <= value <= 1.0:
            raise ValueError(f"{name}={value!r} is outside [0, 1]: pass a fraction of the steps.")
    counted = isinstance(total_steps, int) and not isinstance(total_steps, bool)
    if (start is not None or explore_end < 1.0) and not (counted and total_steps >= 1):
        raise ValueError(
            f"total_steps={total_steps!r} is not a whole number >= 1, but {prefix}start_density "
            "and explore_end need it: pass the number of steps of the run."
        )


def check_group(group: dict[str, Any]) -> None:
    """Check the settings and the parameters of a parameter group.

    Raises:
        ValueError: one sentence that names the setting, or the parameter that fits no rule.
    """
    check_settings(group)
    target = group["target_density"]
    if target is not None and not (_is_number(target) and 0.0 < target <= 1.0):
        raise ValueError(
            f"target_density={target!r} is outside (0, 1]: pass the share of weights that may be "
            "nonzero, or None for no budget."
        )
    schedule = ("start_density", "anneal_end", "explore_end", "total_steps")
    check_schedule(target, *(group[name] for name in schedule))
    for name in ("lr", "eps", "weight_decay"):
        if not 0.0 <= float(group[name]) < math.inf:
            raise ValueError(f"{name}={group[name]!r} is not a finite number >= 0.")
    if not all(0.0 <= beta < 1.0 for beta in group["betas"]):
        raise ValueError(f"betas={group['betas']!r} are not both in [0, 1).")
    minimum = group["min_nonzeros"]
    if isinstance(minimum, bool) or not isinstance(minimum, int) or minimum < 0:
        raise ValueError(f"min_nonzeros={minimum!r} is not a whole number >= 0.")
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
