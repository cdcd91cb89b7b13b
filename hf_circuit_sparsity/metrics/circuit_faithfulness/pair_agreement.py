"""How closely one model's choice between two tokens follows another's.

Everywhere pairs are logits `(n, 2)` of the right and of the wrong candidate.
"""

import numpy as np


def check_pairs(name: str, pairs: np.ndarray, rows: int | None = None) -> np.ndarray:
    """The pairs as float64.

    Raises:
        ValueError: another shape, no rows, another number of rows than `rows`, or NaN.
    """
    pairs = np.asarray(pairs, dtype=np.float64)
    if pairs.ndim != 2 or pairs.shape[1] != 2 or not len(pairs):
        raise ValueError(
            f"{name} have the shape {pairs.shape}; pass the logits (n, 2) of the right and of the "
            "wrong candidate."
        )
    if rows is not None and len(pairs) != rows:
        raise ValueError(f"{name} have {len(pairs)} rows, predictions {rows}; pass as many.")
    if np.isnan(pairs).any():
        raise ValueError(f"{name} hold NaN; check the model's output.")
    return pairs


def agreement(circuit: np.ndarray, model: np.ndarray) -> float:
    """Share of rows in which both prefer the same candidate."""
    return float(((circuit[:, 0] > circuit[:, 1]) == (model[:, 0] > model[:, 1])).mean())


def pair_kl(circuit: np.ndarray, model: np.ndarray) -> float:
    """Mean KL(model ‖ circuit) of the distributions over the two candidates, in nats."""
    log_model, log_circuit = (
        pairs - np.logaddexp(pairs[:, :1], pairs[:, 1:]) for pairs in (model, circuit)
    )
    # Rounding may leave a hair below zero where the two are equal.
    return max(0.0, float((np.exp(log_model) * (log_model - log_circuit)).sum(axis=1).mean()))


def recovered(circuit: np.ndarray, model: np.ndarray, baseline: np.ndarray) -> float:
    """Share of the model's mean logit difference that the circuit recovers over the baseline.

    (m(circuit) - m(baseline)) / (m(model) - m(baseline)), m the mean of right minus wrong logit
    (Wang et al. 2023, arXiv 2211.00593); NaN where model and baseline are equal. The baseline has
    every node ablated.
    """
    m_circuit, m_model, m_baseline = (
        float((pairs[:, 0] - pairs[:, 1]).mean()) for pairs in (circuit, model, baseline)
    )
    gain = m_model - m_baseline
    return (m_circuit - m_baseline) / gain if gain else float("nan")
