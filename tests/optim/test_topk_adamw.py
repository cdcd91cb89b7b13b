import math

import pytest
import torch

from hf_circuit_sparsity.optim.projection import nonzero_budget, project_topk_reference_
from hf_circuit_sparsity.optim.schedules import linear_density, sharkfin
from hf_circuit_sparsity.optim.topk_adamw import TopKAdamW
from tests.optim.conftest import groups_of, random_parameters, set_gradients

SETTINGS = {"target_density": 0.05, "total_steps": 20, "anneal_start": 0.1, "anneal_end": 0.5}


def parameters(dtype=torch.float32):
    matrix, other, _, vector, _ = random_parameters(dtype)
    return [matrix, other, vector]


def test_every_step_is_an_adamw_step_followed_by_the_reference_projection():
    params, twins = parameters(), parameters()
    optimizer = TopKAdamW(groups_of(params), **SETTINGS)
    # foreach off: the fused kernel is compared with torch's plain loop.
    twin = torch.optim.AdamW(
        groups_of(twins), lr=1e-2, betas=(0.9, 0.95), eps=0.1, weight_decay=0.1, foreach=False
    )
    minima = (4, 2)
    for step in range(1, 21):
        set_gradients(params, step)
        set_gradients(twins, step)
        entries = torch.cat([p.grad.flatten() for p in twins])
        rms = float(entries.square().mean().sqrt())
        for p in twins:
            p.grad /= rms
        density = linear_density(step, 0.05, 0.1, 0.5, 20)
        for group in twin.param_groups:
            group["lr"] = 1e-2 / math.sqrt(density)
        optimizer.step()
        twin.step()
        unprojected = [p.detach().clone() for p in twins]
        for p, minimum, row_dim in zip(twins[:2], minima, (0, 1), strict=True):
            if density < 1:
                budget = nonzero_budget(p.numel(), density)
                project_topk_reference_(p, budget, minimum, row_dim)
        assert optimizer.density == density
        assert optimizer.grad_rms == pytest.approx(rms, rel=1e-5)
        assert optimizer.effective_lr == pytest.approx(1e-2 * sharkfin(density))
        for p, q in zip(params, twins, strict=True):
            torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-5, atol=1e-6)
        # The invariants, on their own: the budget or the row minimum, and the largest are kept.
        for p, full, minimum, row_dim in zip(params, unprojected, minima, (0, 1), strict=False):
            kept = p != 0
            rows = p.shape[row_dim]
            budget = p.numel() if density == 1 else nonzero_budget(p.numel(), density)
            assert int(kept.sum()) == max(budget, rows * minimum)
            per_row = kept.sum(dim=1 - row_dim)
            assert int(per_row.min()) >= minimum
            spare = kept & (per_row > minimum).unsqueeze(1 - row_dim)
            if spare.any() and not kept.all():
                assert full[spare].abs().min() >= full[~kept].abs().max() - 1e-6
        assert torch.count_nonzero(params[2]) == params[2].numel()
    assert density == 0.05  # the end of the schedule was seen


def test_numbers_against_the_formulas_written_out():
    """RMS normalization, both moments, bias correction, decay and sharkfin, in float64 by hand."""
    params = parameters(torch.float64)[:1]
    optimizer = TopKAdamW(
        params, target_density=0.1, anneal_start=0, anneal_end=0, fused=False, min_nonzeros=0
    )
    x = params[0].detach().clone()
    m, v = torch.zeros_like(x), torch.zeros_like(x)
    for t in range(1, 8):
        set_gradients(params, t)
        g = params[0].grad.clone()
        optimizer.step()
        g = g / g.square().mean().sqrt()
        m = 0.9 * m + 0.1 * g
        v = 0.95 * v + 0.05 * g.square()
        lr = 1e-2 / math.sqrt(0.1)
        x = x * (1 - lr * 0.1)
        x = x - lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.95**t)).sqrt() + 0.1)
        threshold = x.abs().flatten().sort(descending=True).values[nonzero_budget(x.numel(), 0.1)]
        x = torch.where(x.abs() > threshold, x, 0.0)
        torch.testing.assert_close(params[0].detach(), x, rtol=1e-10, atol=1e-12)
        assert torch.equal(params[0] != 0, x != 0)


@pytest.mark.parametrize(
    ("mode", "size", "expected"),
    [
        ("always", 3.0, 1.0),
        ("always", 0.2, 1.0),
        ("clip", 3.0, 1.0),
        ("clip", 0.2, 0.2),
        ("off", 3.0, 3.0),
    ],
)
def test_gradient_rms_modes(mode, size, expected):
    params = parameters()
    optimizer = TopKAdamW(params, target_density=1.0, normalize_gradients=mode)
    set_gradients(params, 0)
    entries = torch.cat([p.grad.flatten() for p in params])
    scale = size / entries.square().mean().sqrt()
    for p in params:
        p.grad *= scale
    optimizer.step()
    entries = torch.cat([p.grad.flatten() for p in params])
    assert float(entries.square().mean().sqrt()) == pytest.approx(expected, rel=1e-5)
    assert optimizer.grad_rms == pytest.approx(size, rel=1e-5)


def test_learning_rate_of_the_groups_is_left_to_the_scheduler():
    params = parameters()
    optimizer = TopKAdamW(params, lr=0.1, target_density=0.25, anneal_start=0, anneal_end=0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for step in range(3):
        set_gradients(params, step)
        optimizer.step()
        assert optimizer.param_groups[0]["lr"] == 0.1 / (1 + step)
        assert optimizer.effective_lr == pytest.approx(2 * 0.1 / (1 + step))
        scheduler.step()


def test_sharkfin_can_be_turned_off():
    params, twins = parameters(), parameters()
    with_fin = TopKAdamW(params, target_density=0.25, anneal_start=0, anneal_end=0)
    without = TopKAdamW(
        twins, lr=2e-2, target_density=0.25, anneal_start=0, anneal_end=0, sharkfin=False
    )
    for step in range(3):
        set_gradients(params, step)
        set_gradients(twins, step)
        with_fin.step()
        without.step()
    assert without.effective_lr == 2e-2  # = 1e-2 / sqrt(0.25)
    assert all(torch.equal(p, q) for p, q in zip(params, twins, strict=True))


def test_the_state_of_a_plain_adamw_can_be_loaded():
    params = parameters()
    optimizer = TopKAdamW(params, **SETTINGS)
    optimizer.load_state_dict(torch.optim.AdamW(parameters()).state_dict())
    set_gradients(params, 0)
    optimizer.step()
    assert optimizer.steps_taken == 1
    assert optimizer.param_groups[0]["target_density"] == 0.05


def test_groups_may_differ_in_density():
    params = parameters()
    optimizer = TopKAdamW(
        [{"params": params[:1], "target_density": 0.5}, {"params": params[1:]}],
        target_density=0.1,
        anneal_start=0,
        anneal_end=0,
        min_nonzeros=0,
    )
    set_gradients(params, 0)
    optimizer.step()
    counts = [int(torch.count_nonzero(p)) for p in params]
    assert counts == [600, 80, 2]


def test_half_precision_parameters():
    params = parameters(torch.bfloat16)
    optimizer = TopKAdamW(params, target_density=0.1, anneal_start=0, anneal_end=0, min_nonzeros=0)
    for step in range(3):
        set_gradients(params, step)
        optimizer.step()
    assert [int(torch.count_nonzero(p)) for p in params] == [120, 80, 2]
    # The root-mean-square is computed in float32 although the gradients have 8 bits.
    set_gradients(params, 3)
    entries = torch.cat([p.grad.float().flatten() for p in params])
    optimizer.step()
    assert optimizer.grad_rms == pytest.approx(float(entries.square().mean().sqrt()), rel=1e-5)
