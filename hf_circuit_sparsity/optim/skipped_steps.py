"""What an optimizer does about gradients that are not finite: skip, count, report, and stop."""

import logging
from typing import Any

logger = logging.getLogger(__name__)

# One broken batch should not end a run, a run that has gone wrong should end.
MAX_SKIPPED_IN_A_ROW = 3

# Kept in the first parameter group, because groups are what torch saves, loads and copies.
COUNTERS = ("steps_taken", "skipped_steps", "skipped_in_a_row")


def count_skipped_step(counters: dict[str, Any], where: str) -> None:
    """Count one skipped step and report it.

    Args:
        counters: the group that holds :data:`COUNTERS`; changed in place.
        where: the parameter in which the first number that is not finite was found.

    Raises:
        FloatingPointError: at the third skipped step in a row.
    """
    counters["skipped_steps"] += 1
    counters["skipped_in_a_row"] += 1
    step = counters["steps_taken"]
    if counters["skipped_in_a_row"] >= MAX_SKIPPED_IN_A_ROW:
        raise FloatingPointError(
            f"the gradients were not finite in {MAX_SKIPPED_IN_A_ROW} steps in a row (now at "
            f"step {step}, first in {where}): lower the learning rate, train in float32, or look "
            "for batches without labels."
        )
    logger.warning("Step %d skipped: the gradients were not finite (first in %s).", step, where)
