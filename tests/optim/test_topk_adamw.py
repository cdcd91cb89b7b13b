import copy
import io
import logging
import math

import pytest
import torch
from torch import nn

from hf_circuit_sparsity.optim.projection import nonzero_budget, project_topk_reference_
from hf_circuit_sparsity.optim.schedules import linear_density, sharkfin
from hf_circuit_sparsity.optim.topk_adamw import TopKAdamW


def parameters(dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = ((40, 30), (20, 40), (40,))
    return [nn.Parameter(torch.randn(shape, generator=g).to(dtype)) for shape in shapes]


def set_gradients(params, step):
    g = torch.Generator().manual_seed(1000 + step)
    for p in params:
        p.grad = (0.01 * torch.randn(p.shape, generator=g)).to(p.dtype)


def groups_of(params):
    """The first two are sparse matrices, one stored each way; the last is a dense vector."""
    return [
        {"params": [params[0]], "row_dim": 0},
        {"params": [params[1]], "row_dim": 1, "min_nonzeros": 2},
        {"params": [params[2]], "sparse": False, "weight_decay": 0.0},
    ]


SETTINGS = {"target_density": 0.05, "total_steps": 20, "anneal_start": 0.1, "anneal_end": 0.5}


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


def test_gradients_that_are_zero_or_missing():
    params = parameters()
    optimizer = TopKAdamW(params, weight_decay=0.0, target_density=1.0)
    before = [p.detach().clone() for p in params]
    optimizer.step()  # no gradient at all
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    assert optimizer.steps_taken == 2
    assert optimizer.grad_rms == 0.0


def test_stopping_and_loading_gives_bit_for_bit_the_run_that_never_stopped():
    params = parameters()
    optimizer = TopKAdamW(groups_of(params), **SETTINGS)
    stopped = None
    for step in range(1, 16):
        set_gradients(params, step)
        optimizer.step()
        if step == 6:
            stopped = io.BytesIO()
            torch.save([[p.detach() for p in params], optimizer.state_dict()], stopped)
    stopped.seek(0)
    weights, state = torch.load(stopped, weights_only=True)
    resumed = [nn.Parameter(w) for w in weights]
    # Other settings on purpose: the stored ones count, as with every torch optimizer.
    again = TopKAdamW(groups_of(resumed), lr=0.5, target_density=0.9, total_steps=3)
    again.load_state_dict(state)
    assert again.steps_taken == 6
    for step in range(7, 16):
        set_gradients(resumed, step)
        again.step()
    assert again.density == optimizer.density
    for p, q in zip(params, resumed, strict=True):
        assert torch.equal(p, q)
        for name, value in optimizer.state[p].items():
            assert torch.equal(value, again.state[q][name]), name
    assert again.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]


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
    params[0].grad = torch.zeros(40, 30).to_sparse()
    with pytest.raises(RuntimeError, match="sparse tensor"):
        optimizer.step()
    assert optimizer.param_groups[0]["lr"] == 0.1 / 4


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


def test_a_step_that_is_not_finite_is_skipped_and_the_third_in_a_row_raises(caplog):
    params = parameters()
    named = [("first.weight", params[0]), ("second.weight", params[1]), ("third.bias", params[2])]
    optimizer = TopKAdamW(named, target_density=0.5, total_steps=10, anneal_start=0, anneal_end=1)
    set_gradients(params, 0)
    optimizer.step()
    before = [p.detach().clone() for p in params]
    moment = optimizer.state[params[0]]["exp_avg"].clone()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            set_gradients(params, 1)
            params[1].grad[3, 4] = float("nan")
            optimizer.step()
    assert optimizer.skipped_steps == 2
    assert optimizer.steps_taken == 3
    assert "second.weight" in caplog.text
    assert torch.equal(optimizer.state[params[0]]["exp_avg"], moment)
    # No update, but the schedule goes on: what is kept is as it was, and there is less of it.
    for p, b in zip(params, before, strict=True):
        kept = p != 0
        assert int(kept.sum()) == nonzero_budget(p.numel(), optimizer.density)
        assert torch.equal(p[kept], b[kept])

    set_gradients(params, 2)
    optimizer.step()  # a good step makes up for the two
    for _ in range(2):
        params[2].grad[0] = float("inf")
        optimizer.step()
    assert optimizer.skipped_steps == 4
    params[2].grad[0] = float("inf")
    with pytest.raises(FloatingPointError, match=r"3 steps in a row.*step 7.*third\.bias"):
        optimizer.step()


def test_closure_is_called_with_gradients_enabled():
    layer = nn.Linear(6, 3)
    optimizer = TopKAdamW(layer.parameters(), target_density=1.0)

    def closure():
        optimizer.zero_grad()
        loss = layer(torch.ones(1, 6)).square().sum()
        loss.backward()
        return loss

    first = optimizer.step(closure).item()
    for _ in range(5):
        last = optimizer.step(closure).item()
    assert last < first


def test_step_hooks_run_once():
    torch.optim.AdamW([nn.Parameter(torch.ones(2))])  # makes torch wrap AdamW.step
    params = parameters()
    optimizer = TopKAdamW(params, target_density=1.0)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    set_gradients(params, 0)
    optimizer.step()
    assert calls == ["before", "after"]


def test_copies_and_foreign_state_work():
    params = parameters()
    optimizer = TopKAdamW(params, **SETTINGS)
    set_gradients(params, 0)
    optimizer.step()
    twin = copy.deepcopy(optimizer)
    twin.add_param_group({"params": [nn.Parameter(torch.ones(8, 8))]})
    assert twin.param_groups[1]["target_density"] == 0.05
    twin.step()
    assert (twin.steps_taken, optimizer.steps_taken) == (2, 1)

    plain = torch.optim.AdamW(parameters())
    fresh = TopKAdamW(parameters(), **SETTINGS)
    fresh.load_state_dict(plain.state_dict())
    set_gradients(fresh.param_groups[0]["params"], 0)
    fresh.step()
    assert fresh.steps_taken == 1
    assert fresh.param_groups[0]["target_density"] == 0.05


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
    assert counts == [600, 80, 4]


def test_half_precision_parameters():
    params = parameters(torch.bfloat16)
    optimizer = TopKAdamW(params, target_density=0.1, anneal_start=0, anneal_end=0, min_nonzeros=0)
    for step in range(3):
        set_gradients(params, step)
        optimizer.step()
    assert [int(torch.count_nonzero(p)) for p in params] == [120, 80, 4]
    # The root-mean-square is computed in float32 although the gradients have 8 bits.
    set_gradients(params, 3)
    entries = torch.cat([p.grad.float().flatten() for p in params])
    optimizer.step()
    assert optimizer.grad_rms == pytest.approx(float(entries.square().mean().sqrt()), rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"target_density": 0.0}, "target_density"),
        ({"target_density": 1.5}, "target_density"),
        ({"target_density": 0.5}, "total_steps"),
        ({"target_density": 0.5, "total_steps": 0}, "total_steps"),
        ({"total_steps": 10, "anneal_start": 0.7}, "anneal_start"),
        ({"total_steps": 10, "min_nonzeros": -1}, "min_nonzeros"),
        ({"total_steps": 10, "min_nonzeros": 1.5}, "min_nonzeros"),
        ({"total_steps": 10, "row_dim": 2}, "row_dim"),
        ({"total_steps": 10, "normalize_gradients": "sometimes"}, "normalize_gradients"),
        ({"total_steps": 10, "lr": -1.0}, "lr"),
    ],
)
def test_bad_arguments_are_named(arguments, word):
    with pytest.raises(ValueError, match=word):
        TopKAdamW(parameters(), **arguments)


def test_a_bad_group_is_refused_before_it_is_added():
    params = parameters()
    optimizer = TopKAdamW(params[:2], **SETTINGS)
    with pytest.raises(ValueError, match="target_density=2"):
        optimizer.add_param_group({"params": params[2:], "target_density": 2})
    assert len(optimizer.param_groups) == 1
