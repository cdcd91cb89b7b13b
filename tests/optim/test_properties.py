"""What holds for all matrices, schedules and settings."""

from itertools import pairwise

import pytest
import torch
from hypothesis import strategies as st

from hf_circuit_sparsity.optim.projection import (
    nonzero_budget,
    project_bisection_,
    project_topk_,
    project_topk_reference_,
)
from hf_circuit_sparsity.optim.rcd.config import RCDConfig
from hf_circuit_sparsity.optim.rcd.optimizer import RCDSparseOptimizer
from hf_circuit_sparsity.optim.schedules import geometric_density, linear_density, sharkfin
from hf_circuit_sparsity.optim.topk_adamw import TopKAdamW
from tests.properties import holds_for, matrices

SHARES = st.floats(0, 1, exclude_min=True)
FRACTIONS = st.floats(0, 1)


@pytest.mark.usefixtures("either_path")
@holds_for(
    50, weight=matrices(), share=FRACTIONS, minimum=st.integers(0, 5), row_dim=st.integers(0, 1)
)
def test_projection(weight, share, minimum, row_dim):
    k = round(share * weight.numel())
    expected = weight.clone()
    project_topk_reference_(expected, k, minimum, row_dim)
    for project in (project_topk_, project_bisection_) if weight.numel() else (project_topk_,):
        found = weight.clone()
        project(found, k, minimum, row_dim)
        assert torch.equal(found, expected)
        project(found, k, minimum, row_dim)
        assert torch.equal(found, expected)  # what is projected already stays
    kept = expected != 0
    assert torch.equal(expected[kept], weight[kept])
    safe = (weight != 0).sum(1 - row_dim).clamp(max=minimum)
    assert (kept.sum(1 - row_dim) >= safe).all()
    assert kept.sum() == max(min(k, int((weight != 0).sum())), int(safe.sum()))


@holds_for(150, numel=st.integers(0, 10**12), density=SHARES, more=SHARES)
def test_budget(numel, density, more):
    low, high = sorted((density, more))
    assert min(1, numel) <= nonzero_budget(numel, low) <= nonzero_budget(numel, high) <= numel


@holds_for(150, target=SHARES, ends=st.tuples(FRACTIONS, FRACTIONS), total=st.integers(1, 300))
def test_linear_schedule(target, ends, total):
    start, end = sorted(ends)
    found = [linear_density(step, target, start, end, total) for step in range(1, total + 1)]
    assert all(a >= b for a, b in zip([1.0, *found], [*found, target], strict=True))
    assert found[-1] == target
    assert all(1 <= sharkfin(density) < float("inf") for density in found)


@holds_for(150, densities=st.tuples(SHARES, SHARES), end=FRACTIONS, total=st.integers(1, 300))
def test_geometric_schedule(densities, end, total):
    target, start = sorted(densities)
    found = [geometric_density(step, target, start, end, total) for step in range(1, total + 1)]
    assert all(start >= density >= target for density in found) and found[-1] == target
    assert all(a >= b * (1 - 1e-12) for a, b in pairwise(found))


# Of settings, good ones more often than bad ones; what is left out keeps its default.
SHARE = st.sampled_from([0.5, 1e-3, 1.0, 0.25, 1 / 3, 0.0, -1.0, 2.0, float("nan")])
FRACTION = st.sampled_from([0.5, 0.0, 1.0, 1, 0.1, float("inf")])
SIZE = st.sampled_from([0.0, 1e-3, 0.5, 1.0, 2.0, -1.0, float("nan"), float("inf")])
WHOLE = st.sampled_from([1, 2, 7, 3, 10**9, 0, -1, True, 1.0])
SHARED = {
    "target_density": SHARE, "total_steps": WHOLE | st.none(), "anneal_end": FRACTION,
    "weight_decay": SIZE, "eps": SIZE,
    "normalize_gradients": st.sampled_from(["always", "clip", "off", "on"]),
}  # fmt: skip
TOPK = {
    **SHARED, "anneal_start": FRACTION, "min_nonzeros": WHOLE, "betas": st.tuples(SIZE, SIZE),
}  # fmt: skip
RCD = {
    "selection": st.sampled_from(["uniform", "magnitude", "cyclic", "gradient", "none"]),
    "block": st.sampled_from(["rows", "columns", "entries", "heads"]),
    "update": st.sampled_from(["adam", "plain"]),
    **dict.fromkeys(("block_fraction", "magnitude_floor", "greedy_fraction"), SHARE),
    **dict.fromkeys(("clip_threshold", "l1", "magnitude_power"), SIZE),
    **dict.fromkeys(("block_steps", "staleness"), WHOLE),
    "start_density": SHARE | st.none(), "explore_end": FRACTION, "move_active": st.booleans(),
}  # fmt: skip


def some(settings):
    return st.fixed_dictionaries({}, optional=settings)


def two_steps_or_refused(make):
    """A matrix and a vector stay finite in two steps, unless the settings are refused."""
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in ((5, 3), (4,))]
    try:
        optimizer = make(parameters)
    except ValueError as error:
        assert any(f"{name}=" in str(error) for name in (*TOPK, *RCD)), error
        return
    for _ in range(2):
        for p in parameters:
            p.grad = torch.randn_like(p)
        optimizer.step()
    assert all(p.isfinite().all() for p in parameters)


@holds_for(40, settings=some(TOPK))
def test_settings_of_topk_are_taken_or_refused(settings):
    given = {"total_steps": 3, **settings}
    two_steps_or_refused(lambda parameters: TopKAdamW(parameters, **given))


@holds_for(40, run=some(SHARED), settings=some(RCD))
def test_settings_of_rcd_are_taken_or_refused(run, settings):
    given = {"total_steps": 3, **run}
    two_steps_or_refused(
        lambda parameters: RCDSparseOptimizer(parameters, config=RCDConfig(**settings), **given)
    )
