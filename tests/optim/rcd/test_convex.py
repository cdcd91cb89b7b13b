"""Convex problems, whose optimum is known by its conditions: what coordinate descent ends at."""

import pytest
import torch
from torch import nn

from hf_circuit_sparsity import RCDSparseOptimizer

COORDINATES = 12
LASSO, LOGISTIC = "lasso", "logistic"
PENALTIES = {LASSO: 0.05, LOGISTIC: 0.5}


def problem(kind):
    """The gradient of a sum of squares or of logistic losses, and its steepest second derivative.

    Four of the coordinates are behind the data.
    """
    g = torch.Generator().manual_seed(0)
    features = torch.randn(100, COORDINATES, generator=g, dtype=torch.float64) / 10
    truth = torch.zeros(COORDINATES, dtype=torch.float64)
    truth[::3] = torch.tensor([1.0, -2.0, 0.7, 3.0], dtype=torch.float64)
    noise = torch.randn(100, generator=g, dtype=torch.float64)
    curvature = float(features.square().sum(0).max())
    if kind == LASSO:
        targets = features @ truth + 0.02 * noise
        return lambda x: features.T @ (features @ x - targets), curvature
    labels = (features @ truth + 0.3 * noise > 0).double()
    return lambda x: features.T @ (torch.sigmoid(features @ x) - labels), curvature / 4


def distance_from_optimality(x, gradient, penalty):
    """How far the conditions of the optimum with the penalty are from holding; 0 at it alone."""
    at_zero = (gradient.abs() - penalty).clamp(min=0)
    return float(torch.where(x == 0, at_zero, (gradient + penalty * x.sign()).abs()).max())


def descend(kind, most, **settings):
    """Steps until the conditions hold, or None; and the weights."""
    (gradient_of, curvature), penalty = problem(kind), PENALTIES[kind]
    x = nn.Parameter(torch.zeros(COORDINATES, dtype=torch.float64))
    settings = {"block_fraction": 1 / COORDINATES, **settings}
    optimizer = RCDSparseOptimizer(
        [x], lr=1 / curvature, block="entries", update="plain", move_active=False, l1=penalty,
        **settings,
    )  # fmt: skip
    for step in range(1, most + 1):
        x.grad = gradient_of(x.detach())
        optimizer.step()
        if step % 10 == 0:
            gradient = gradient_of(x.detach())
            if distance_from_optimality(x.detach(), gradient, penalty) < 1e-4:
                return step, x.detach()
    return None, x.detach()


@pytest.mark.parametrize("selection", ["uniform", "magnitude", "cyclic"])
@pytest.mark.parametrize("kind", [LASSO, LOGISTIC])
def test_single_coordinates_end_at_the_optimum_whatever_draws_them(kind, selection):
    steps, x = descend(kind, 1000, selection=selection)
    assert steps is not None
    assert 2 < int(torch.count_nonzero(x)) < COORDINATES  # exact zeros, and not all


def test_a_greedy_choice_within_blocks_ends_there_too():
    steps, _ = descend(LASSO, 1000, selection="gradient", block_fraction=1 / 3)
    assert steps is not None


def test_magnitude_takes_about_the_steps_of_uniform_with_its_floor_and_starves_zeros_without():
    """All draws end at one optimum; with a low floor it takes long until every zero was drawn."""
    uniform, _ = descend(LASSO, 1000, selection="uniform")
    by_size, _ = descend(LASSO, 1000, selection="magnitude")
    assert by_size <= 1.5 * uniform
    starved, _ = descend(LASSO, 2 * uniform, selection="magnitude", magnitude_floor=0.1)
    assert starved is None
