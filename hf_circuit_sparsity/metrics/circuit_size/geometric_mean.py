"""The size of circuits over several tasks: a geometric mean, as in Gao et al. 2025."""

from collections.abc import Sequence

import numpy as np


def geometric_mean(counts: Sequence[float]) -> float:
    """exp of the mean of logs; 0 if any count is 0.

    Raises:
        ValueError: no counts, or one that is negative or not finite.
    """
    counts = np.asarray(counts, dtype=np.float64)
    if counts.ndim != 1 or not counts.size or not np.isfinite(counts).all() or counts.min() < 0:
        raise ValueError(
            f"The counts are {counts.tolist()!r:.100}; pass at least one, none of them negative."
        )
    if counts.min() == counts.max():
        return float(counts[0])  # exactly, which exp(log(n)) is not
    with np.errstate(divide="ignore"):
        return float(np.exp(np.log(counts).mean()))


def shares(counts: Sequence[float], totals: Sequence[float]) -> np.ndarray:
    """What part of each total each count is, float64 `(n,)`; 0 of a total of 0.

    Raises:
        ValueError: not as many of both, or a count larger than its total.
    """
    counts, totals = np.asarray(counts, np.float64), np.asarray(totals, np.float64)
    if counts.shape != totals.shape or (counts > totals).any():
        raise ValueError(
            f"The counts are {counts.tolist()!r:.100} of {totals.tolist()!r:.100}; pass as many of "
            "both, each count at most its total."
        )
    return counts / np.maximum(totals, 1)
