"""Metrics of the method as `evaluate` modules, one folder each.

A folder is loaded by its path, or from the Hub by `evaluate.load("user/task_loss")`. Its module is
the interface; the file beside it has the formula in NumPy alone, which our own evaluation calls, so
that every number comes from one place.
"""

from pathlib import Path

METRICS = ("task_loss", "circuit_faithfulness", "circuit_size")


def metric_path(name: str) -> str:
    """The folder of a metric, for `evaluate.load(metric_path("task_loss"))`.

    Raises:
        ValueError: there is no such metric.
    """
    if name not in METRICS:
        raise ValueError(f"There is no metric {name!r}; choose from {', '.join(METRICS)}.")
    return str(Path(__file__).parent / name)
