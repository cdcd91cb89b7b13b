"""Loss and accuracy on a binary task, from the logits of its two candidate tokens."""

from collections.abc import Sequence

import numpy as np


def answer_pairs(
    logits: np.ndarray,
    references: Sequence[int],
    counterfactual_references: Sequence[int] | None = None,
) -> np.ndarray:
    """The logits `(n, 2)` of the right and of the wrong candidate, in this order.

    Args:
        logits: `(n, k)`, of the candidates or of the whole vocabulary, at the answer's position.
        references: `(n,)`, the column of the right candidate.
        counterfactual_references: `(n,)`, that of the wrong one; the other one if k is 2.

    Raises:
        ValueError: shapes do not fit, a column is out of range, or a candidate's logit is NaN.
    """
    logits = np.asarray(logits, dtype=np.float64)
    right = np.asarray(references, dtype=np.int64)
    wrong = 1 - right
    if counterfactual_references is not None:
        wrong = np.asarray(counterfactual_references, dtype=np.int64)
    fits = logits.ndim == 2 and logits.shape[1] >= 2
    if not fits or not right.shape == wrong.shape == logits.shape[:1]:
        raise ValueError(
            f"predictions have the shape {logits.shape}, references {right.shape} and "
            f"counterfactual_references {wrong.shape}; pass logits (n, k) of at least two "
            "candidates and n columns of each."
        )
    if counterfactual_references is None and logits.shape[1] != 2:
        raise ValueError(
            f"predictions have {logits.shape[1]} columns; with more than two pass "
            "counterfactual_references, the column of the wrong candidate of each row."
        )
    for name, columns in (("references", right), ("counterfactual_references", wrong)):
        outside = columns[(columns < 0) | (columns >= logits.shape[1])]
        if outside.size:
            raise ValueError(
                f"{name} names column {outside[0]}, but predictions have {logits.shape[1]}; pass "
                "columns from 0."
            )
    rows = np.arange(len(logits))
    pairs = np.stack([logits[rows, right], logits[rows, wrong]], axis=1)
    if np.isnan(pairs).any():
        row = int(np.isnan(pairs).any(axis=1).argmax())
        raise ValueError(f"predictions[{row}] is NaN at a candidate; check the model's output.")
    return pairs


def task_loss(pairs: np.ndarray) -> float:
    """Mean over rows of -log p(right candidate) between the two of `pairs` `(n, 2)`, in nats."""
    pairs = np.asarray(pairs, dtype=np.float64)
    return float(np.logaddexp(0.0, pairs[:, 1] - pairs[:, 0]).mean())


def task_accuracy(pairs: np.ndarray) -> float:
    """Share of rows `(n, 2)` whose right candidate has the larger logit; a tie is wrong."""
    pairs = np.asarray(pairs)
    return float((pairs[:, 0] > pairs[:, 1]).mean())
