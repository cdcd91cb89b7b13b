"""When a run is how sparse: the density schedule and the learning-rate factor that goes with it."""

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class DensitySchedule:
    """The kept fraction of every weight matrix as a function of the training step.

    1 until ``anneal_start``, then linear down to ``target_density`` at ``anneal_end``, then
    constant (Gao et al. 2025, section 2).

    Args:
        target_density: kept fraction at the end, in (0, 1].
        anneal_start: where the descent begins, as a fraction of ``total_steps``, in [0, 1].
        anneal_end: where it ends, as a fraction of ``total_steps``, in [``anneal_start``, 1].
        total_steps: number of optimizer steps of the whole run, at least 1.

    Raises:
        ValueError: if a value is outside its range.
    """

    target_density: float
    anneal_start: float = 0.01
    anneal_end: float = 0.5
    total_steps: int = 1

    def __post_init__(self) -> None:
        # `not (a < x)` rather than `x <= a`, so that NaN is refused as well.
        if not 0.0 < self.target_density <= 1.0:
            raise ValueError(
                f"target_density={self.target_density} is outside (0, 1]: pass the fraction of "
                "weights to keep, for example 1/64."
            )
        if not 0.0 <= self.anneal_start <= self.anneal_end <= 1.0:
            raise ValueError(
                f"anneal_start={self.anneal_start} and anneal_end={self.anneal_end} must satisfy "
                "0 <= anneal_start <= anneal_end <= 1: pass them as fractions of the training."
            )
        if isinstance(self.total_steps, bool) or not isinstance(self.total_steps, int):
            raise ValueError(
                f"total_steps={self.total_steps!r} is not a whole number: pass the number of "
                "optimizer steps of the run."
            )
        if self.total_steps < 1:
            raise ValueError(
                f"total_steps={self.total_steps} is below 1: pass the number of optimizer steps "
                "of the run."
            )

    def density(self, step: int) -> float:
        """Kept fraction, in [target_density, 1], that holds once ``step`` optimizer steps are done.

        The first step of a run is ``step=1``; so even with ``anneal_end=1`` the last step
        (``step=total_steps``) lands on the target exactly.
        """
        start, end = self.anneal_start * self.total_steps, self.anneal_end * self.total_steps
        if step >= end:
            return self.target_density
        if step <= start:
            return 1.0
        return 1.0 + (self.target_density - 1.0) * (step - start) / (end - start)


def scheduled_density(group: dict[str, Any], step: int) -> float | None:
    """The budget of a group of :class:`RCDSparseOptimizer` in step ``step``, counted from 1.

    From ``start_density`` it falls by equal factors to ``target_density`` and gets there at
    ``anneal_end``: what a step costs falls as fast as the density does.

    Returns:
        A share in (0, 1], or None where there is no budget.
    """
    target, start = group["target_density"], group["start_density"]
    if target is None or start is None:
        return target
    end = group["anneal_end"] * group["total_steps"]
    share = min(1.0, step / end) if end > 0 else 1.0
    return start ** (1.0 - share) * target**share if share < 1.0 else target


def sharkfin(density: float) -> float:
    """Learning-rate factor ``1 / sqrt(density)`` for a model of which ``density`` is kept.

    Named for the shape it gives a linearly decaying learning rate (Gao et al. 2025, section 2).

    Raises:
        ValueError: if ``density`` is outside (0, 1].
    """
    if not 0.0 < density <= 1.0:
        raise ValueError(f"density={density} is outside (0, 1]: pass the kept fraction.")
    return 1.0 / math.sqrt(density)
