"""How dense the weights are at which step, and the learning-rate factor that goes with it."""

import math

from .settings import check, check_density, is_fraction, is_share, is_whole


def linear_density(
    step: int, target_density: float, anneal_start: float, anneal_end: float, total_steps: int
) -> float:
    """The kept fraction of every weight matrix once `step` optimizer steps are done.

    It is 1 until `anneal_start`, then falls linearly to `target_density` at `anneal_end`, then
    stays (Gao et al. 2025, section 2). The first step of a run is 1; so even with `anneal_end=1`
    the last step lands on the target exactly. See [`check_linear_density`] for the arguments.
    """
    start, end = anneal_start * total_steps, anneal_end * total_steps
    if step >= end:
        return target_density
    if step <= start:
        return 1.0
    return 1.0 + (target_density - 1.0) * (step - start) / (end - start)


def check_linear_density(
    target_density: float, anneal_start: float, anneal_end: float, total_steps: int | None
) -> None:
    """Check the arguments of [`linear_density`].

    Args:
        target_density: kept fraction at the end, in (0, 1].
        anneal_start: where the descent begins, as a fraction of `total_steps`, in [0, 1].
        anneal_end: where it ends, as a fraction of `total_steps`, in [`anneal_start`, 1].
        total_steps: number of optimizer steps of the whole run, at least 1; None is allowed only
            where the density never changes.

    Raises:
        ValueError: if a value is outside its range.
    """
    check("target_density", target_density, is_share(target_density), "a share in (0, 1]")
    order = is_fraction(anneal_start) and is_fraction(anneal_end) and anneal_start <= anneal_end
    expected = f"fractions of the steps, no later than anneal_end={anneal_end!r}, in [0, 1]"
    check("anneal_start", anneal_start, order, expected)
    if total_steps is not None or (target_density != 1.0 and anneal_end != 0.0):
        expected = (
            f"the optimizer steps of the run, as the density is to fall to {target_density} (or "
            "pass anneal_start=0 and anneal_end=0 to be sparse from the first step)"
        )
        check("total_steps", total_steps, is_whole(total_steps, 1), expected)


def geometric_density(
    step: int, target_density: float, start_density: float, anneal_end: float, total_steps: int
) -> float:
    """The density in step `step`, counted from 1, of a run that starts sparse.

    From `start_density` it falls by equal factors to `target_density` and gets there at
    `anneal_end`: what a step costs falls as fast as the density does.
    """
    end = anneal_end * total_steps
    share = min(1.0, step / end) if end > 0 else 1.0
    if share == 1.0:
        return target_density
    density = start_density ** (1.0 - share) * target_density**share
    return min(start_density, max(target_density, density))  # which rounding may leave


def sharkfin(density: float) -> float:
    """Learning-rate factor `1 / sqrt(density)` for a model of which `density` is kept.

    Named for the shape it gives a linearly decaying learning rate (Gao et al. 2025, section 2).

    Raises:
        ValueError: if `density` is outside (0, 1].
    """
    check_density(density)
    return 1.0 / math.sqrt(density)
