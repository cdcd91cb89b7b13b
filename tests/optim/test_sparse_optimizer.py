"""What both optimizers share: refusals, skipped steps, exact resumption, copies, closures."""

import copy
import io
import logging
import pickle
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn

from hf_circuit_sparsity import RCDSparseOptimizer, TopKAdamW
from hf_circuit_sparsity.optim.projection import nonzero_budget
from hf_circuit_sparsity.optim.rcd.distributed import RCDProcessGroup
from tests.optim.conftest import groups_of, random_parameters, set_gradients

topk = partial(TopKAdamW, target_density=0.05, total_steps=20, anneal_start=0.1, anneal_end=0.5)
rcd = partial(
    RCDSparseOptimizer, lr=0.05, block_fraction=0.25, block_steps=3, target_density=0.2,
    min_nonzeros=2, l1=1e-4, clip_threshold=1e-4, weight_decay=0.1, normalize_gradients="always",
    seed=7,
)  # fmt: skip
both = pytest.mark.parametrize("make", [topk, rcd], ids=["topk", "rcd"])


@pytest.mark.parametrize(
    "make",
    [
        topk,
        *(
            partial(rcd, selection=selection, block=block)
            for selection in ("uniform", "magnitude", "gradient", "cyclic")
            for block in ("rows", "columns", "entries")
        ),
    ],
)
def test_stopping_and_loading_gives_bit_for_bit_the_run_that_never_stopped(make):
    params = random_parameters()
    optimizer = make(groups_of(params))
    for step in range(1, 16):
        set_gradients(params, step)
        optimizer.step()
        if step == 5:  # while a block stays, while the density falls
            stopped = io.BytesIO()
            torch.save([[p.detach() for p in params], optimizer.state_dict()], stopped)
    stopped.seek(0)
    weights, state = torch.load(stopped, weights_only=True)
    resumed = [nn.Parameter(w) for w in weights]
    torch.manual_seed(99)  # nothing depends on the global generator
    # Other settings on purpose: the stored ones count, as with every torch optimizer.
    again = type(optimizer)(groups_of(resumed), lr=0.5, target_density=0.9, total_steps=3)
    again.load_state_dict(state)
    assert again.steps_taken == 5
    for step in range(6, 16):
        set_gradients(resumed, step)
        again.step()
    assert again.density == optimizer.density
    assert all(torch.equal(p, q) for p, q in zip(params, resumed, strict=True))
    state, state_again = optimizer.state_dict(), again.state_dict()
    assert state_again["param_groups"] == state["param_groups"]
    for number, values in state["state"].items():
        for name, value in values.items():
            other = state_again["state"][number][name]
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other)), name


@pytest.mark.parametrize(
    "make",
    [
        partial(TopKAdamW, target_density=0.5, total_steps=10, anneal_start=0, anneal_end=1),
        partial(RCDSparseOptimizer, block_fraction=1.0),
    ],
)
def test_a_step_that_is_not_finite_is_skipped_and_the_third_in_a_row_raises(make, caplog):
    params = random_parameters()
    optimizer = make([(f"layers.{i}", p) for i, p in enumerate(params)])
    set_gradients(params, 0)
    optimizer.step()
    before = [p.detach().clone() for p in params]
    moment = optimizer.state_dict()["state"][0]["exp_avg"].clone()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            set_gradients(params, 1)
            params[1].grad[3, 4] = float("nan")
            optimizer.step()
    assert (optimizer.skipped_steps, optimizer.steps_taken) == (2, 3)
    assert "layers.1" in caplog.text
    assert torch.equal(optimizer.state_dict()["state"][0]["exp_avg"], moment)
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
    with pytest.raises(FloatingPointError, match=r"layers\.2"):
        optimizer.step()


@both
def test_gradients_that_are_missing_zero_or_sparse(make):
    params = random_parameters()
    optimizer = make.func(params, weight_decay=0.5, target_density=1.0)
    before = [p.detach().clone() for p in params]
    optimizer.step()  # no gradient at all, so no decay either
    optimizer.param_groups[0]["weight_decay"] = 0.0
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    assert optimizer.steps_taken == 2
    assert optimizer.grad_rms == 0.0
    params[0].grad = torch.zeros(40, 30).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_closure_is_called_with_gradients_enabled(make, dtype):
    layer = nn.Linear(12, 8).to(dtype)
    optimizer = make.func(layer.parameters(), lr=0.05, target_density=1.0)

    def closure():
        optimizer.zero_grad()
        loss = layer(torch.ones(1, 12, dtype=dtype)).square().sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(20)]
    assert min(losses) < losses[0] / 4


@both
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_work(make, copied):
    params = random_parameters()
    settings = {"staleness": 1} if make is rcd else {}
    optimizer = make(groups_of(params), **settings)
    set_gradients(params, 0)
    optimizer.step()
    twin = copied(optimizer)
    twin.add_param_group({"params": [nn.Parameter(torch.ones(8, 8))]})
    assert twin.param_groups[-1]["target_density"] == make.keywords["target_density"]
    twin.step()
    assert (twin.steps_taken, optimizer.steps_taken) == (2, 1)
    if make is rcd:
        assert twin._exchange.staleness == 1


def test_a_copy_keeps_its_processes_and_a_pickle_says_why_it_cannot(tmp_path):
    store = f"file://{tmp_path}/store"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        optimizer = rcd(random_parameters(), process_group=RCDProcessGroup())
        assert copy.deepcopy(optimizer)._exchange.process_group is optimizer.process_group
        with pytest.raises(TypeError, match="state_dict"):
            pickle.dumps(optimizer)
    finally:
        dist.destroy_process_group()


def by_name(optimizer, saved):
    """A pre-hook as in torch's documentation: states follow the names of their parameters."""
    (group,), (own,) = saved["param_groups"], optimizer.param_groups
    number_of = dict(zip(group["param_names"], group["params"], strict=True))
    names = own["param_names"]
    group = {**group, "param_names": names, "params": [number_of[name] for name in names]}
    return {**saved, "param_groups": [group]}


@both
def test_a_state_may_be_loaded_by_name(make):
    params = random_parameters()
    named = [(f"layers.{i}", p) for i, p in enumerate(params)]
    optimizer = make(named)
    for step in range(3):
        set_gradients(params, step)
        optimizer.step()
    seen = []
    optimizer.register_state_dict_post_hook(lambda _, saved: seen.extend(saved["state"].values()))
    saved = optimizer.state_dict()
    assert all(isinstance(state, dict) for state in seen)
    copies = [(name, nn.Parameter(p.detach().clone())) for name, p in named]
    again = make(copies[::-1])
    again.register_load_state_dict_pre_hook(by_name)
    again.load_state_dict(saved)
    of_again = again.state_dict()["state"]
    for number, values in saved["state"].items():
        for name, value in values.items():
            other = of_again[len(params) - 1 - number][name]
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other)), name
    set_gradients([p for _, p in copies], 3)
    again.step()
    for _, p in copies:
        assert int(torch.count_nonzero(p)) <= nonzero_budget(p.numel(), again.density) + 40


@pytest.mark.parametrize(
    ("make", "other"),
    [(topk, rcd), (rcd, topk), (rcd, torch.optim.AdamW), (topk, torch.optim.RMSprop)],
)
def test_the_state_of_another_kind_is_refused_and_nothing_is_changed(make, other):
    params, others = random_parameters(), random_parameters()
    optimizer, foreign = make(params), other(others)
    for o, ps in ((optimizer, params), (foreign, others)):
        set_gradients(ps, 0)
        o.step()
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=type(optimizer).__name__):
        optimizer.load_state_dict(foreign.state_dict())
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert after["state"].keys() == before["state"].keys()
    set_gradients(params, 1)
    optimizer.step()


@both
def test_what_a_plain_adamw_does_not_save_stays_as_it_is(make):
    params = random_parameters()
    optimizer = make(groups_of(params))
    optimizer.load_state_dict(torch.optim.AdamW(groups_of(random_parameters())).state_dict())
    assert [group["sparse"] for group in optimizer.param_groups] == [True, True, False]
    set_gradients(params, 0)
    optimizer.step()
    assert int(torch.count_nonzero(params[-1])) == params[-1].numel()


@both
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_state_may_be_loaded_into_another_dtype(make, dtype):
    params, others = random_parameters(), random_parameters(dtype)
    optimizer, again = make(groups_of(params)), make(groups_of(others))
    set_gradients(params, 0)
    optimizer.step()
    again.load_state_dict(optimizer.state_dict())
    if make is rcd:  # positions up to 1199 are no bfloat16
        for p, q in zip(params[:-1], others, strict=False):
            assert torch.equal(optimizer.sparse_state(p).active, again.sparse_state(q).active)
            wide = torch.promote_types(dtype, torch.float32)
            assert again.state[q].moments["exp_avg"].dtype == wide
    set_gradients(others, 1)
    again.step()
    assert again.steps_taken == 2


@both
@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize(
    "weight",
    [torch.tensor(1.0), torch.empty(0, 4), torch.randn(4, 4, dtype=torch.complex64)],
    ids=["scalar", "empty", "complex"],
)
def test_odd_parameters_are_trained_or_refused_at_the_start(make, weight, sparse):
    p = nn.Parameter(weight.clone())
    if sparse and (p.is_complex() or (make is rcd and not p.numel())):
        with pytest.raises(ValueError, match="parameter 0"):
            make([p])
        return
    optimizer = make([p], sparse=sparse)
    for _ in range(3):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert p.numel() == 0 or not torch.equal(p, weight)


BAD = {
    "lr": [-1.0], "betas": [(0.9, 1.0)], "min_nonzeros": [-1, 1.5], "row_dim": [2],
    "normalize_gradients": ["sometimes"], "target_density": [0.0, 1.5],
}  # fmt: skip
BAD_FOR_TOPK = {**BAD, "total_steps": [None, 0], "anneal_start": [0.7]}
BAD_FOR_RCD = {
    **BAD, "block_fraction": [0.0, 1.5, float("nan")], "greedy_fraction": [2],
    "magnitude_floor": [0.0], "selection": ["lucky"], "block": ["tiles"], "update": ["newton"],
    "block_steps": [0], "clip_threshold": [-1.0], "l1": [float("inf")], "start_density": [0.1],
    "explore_end": [1.5, False], "anneal_end": [False], "staleness": [-1],
    "rest_steps": [-1], "replace_fraction": [1.0, float("nan")], "grace_steps": [0.5],
}  # fmt: skip
# The last argument of each is at fault, given the others.
BAD_TOGETHER = [
    {"target_density": None, "start_density": 0.5},
    {"explore_end": 0.5, "total_steps": None},
    {"start_density": 0.5, "total_steps": 0},
    {"staleness": 1, "move_active": False},
    {"target_density": None, "replace_fraction": 0.1},
    {"update": "plain", "grace_steps": 3},
]


@pytest.mark.parametrize(
    ("make", "arguments"),
    [
        *((topk, {name: value}) for name, values in BAD_FOR_TOPK.items() for value in values),
        *((rcd, {name: value}) for name, values in BAD_FOR_RCD.items() for value in values),
        *((rcd, arguments) for arguments in BAD_TOGETHER),
    ],
)
def test_bad_arguments_are_named(make, arguments):
    with pytest.raises(ValueError, match=list(arguments)[-1]):
        make(random_parameters(), **arguments)


@both
def test_a_bad_group_is_refused_before_it_is_added(make):
    params = random_parameters()
    optimizer = make(params[:2])
    with pytest.raises(ValueError, match="target_density"):
        optimizer.add_param_group({"params": params[2:], "target_density": 2})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("make", [TopKAdamW, RCDSparseOptimizer])
def test_steps_that_a_scaler_leaves_out_do_not_count(make):
    """With float16 an infinite loss is the scaler's business: it lowers its scale and tries on."""
    weight = nn.Parameter(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))
    optimizer = make([weight], target_density=0.25, total_steps=4, min_nonzeros=0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**15)
    for i in range(8):
        loss = (weight * torch.arange(64.0).view(8, 8)).sum()
        loss = loss * torch.inf if i in (1, 2, 3, 4) else loss  # more than may be broken in a row
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        before = weight.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(weight, before) == (i in (1, 2, 3, 4))
    assert (optimizer.steps_taken, optimizer.skipped_steps) == (4, 0)
    assert scaler.get_scale() == 2.0**11 and weight.isfinite().all()
    assert torch.count_nonzero(weight) == 16
