import math

import pytest
import torch

from hf_circuit_sparsity import TopKAdamW
from hf_circuit_sparsity.optim.projection import nonzero_budget, project_topk_reference_
from hf_circuit_sparsity.optim.schedules import linear_density
from tests.optim.conftest import groups_of, random_parameters, set_gradients


def parameters(dtype=torch.float32):
    matrix, other, _, vector, _ = random_parameters(dtype)
    return [matrix, other, vector]


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_every_step_is_the_formulas_followed_by_the_reference_projection(dtype, close):
    params = parameters(dtype)
    groups = groups_of(params)
    groups[1].update(target_density=0.07, sharkfin=False)
    optimizer = TopKAdamW(groups, total_steps=20, target_density=0.05, anneal_start=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    twins = [(p.detach().clone(), torch.zeros_like(p), torch.zeros_like(p)) for p in params]
    for step in range(1, 21):
        set_gradients(params, step)
        gradients = [p.grad.clone() for p in params]
        rms = torch.cat([g.flatten() for g in gradients]).square().mean().sqrt()
        optimizer.step()
        assert optimizer.grad_rms == pytest.approx(float(rms), rel=close)
        for i, (p, g, group) in enumerate(zip(params, gradients, groups, strict=True)):
            x, m, v = twins[i]
            density = linear_density(step, 0.07 if i == 1 else 0.05, 0.1, 0.5, 20)
            lr = 1e-2 / step / (1.0 if i == 1 else math.sqrt(density))
            g = g / rms
            m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g.square()
            x = x * (1 - lr * group.get("weight_decay", 0.1))
            x = x - lr * (m / (1 - 0.9**step)) / ((v / (1 - 0.95**step)).sqrt() + 0.1)
            if group.get("sparse", True) and density < 1:
                budget = nonzero_budget(x.numel(), density)
                minimum, row_dim = group.get("min_nonzeros", 4), group.get("row_dim", 0)
                project_topk_reference_(x, budget, minimum, row_dim)
            twins[i] = x, m, v
            assert torch.equal(p != 0, x != 0)
            torch.testing.assert_close(p.detach(), x, rtol=close, atol=close / 10)
            assert optimizer.param_groups[i]["lr"] == 1e-2 * (1 / step)  # it is the scheduler's
            if i == 0:
                assert optimizer.density == density
                assert optimizer.effective_lr == pytest.approx(lr)
        scheduler.step()
    assert density == 0.05  # the end of the schedule was seen


@pytest.mark.parametrize(
    ("mode", "size", "expected"),
    [("always", 3.0, 1.0), ("always", 0.2, 1.0), ("clip", 3.0, 1.0), ("clip", 0.2, 0.2),
     ("off", 3.0, 3.0)],
)  # fmt: skip
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


def test_half_precision_parameters():
    params = parameters(torch.bfloat16)
    optimizer = TopKAdamW(params, target_density=0.1, anneal_start=0, anneal_end=0, min_nonzeros=0)
    for step in range(3):
        set_gradients(params, step)
        # The root-mean-square is computed in float32 although the gradients have 8 bits.
        entries = torch.cat([p.grad.float().flatten() for p in params])
        optimizer.step()
        assert [int(torch.count_nonzero(p)) for p in params] == [120, 80, 2]
        rms = float(entries.square().mean().sqrt())
        assert optimizer.grad_rms == pytest.approx(rms, rel=1e-5)
