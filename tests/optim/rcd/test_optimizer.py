import math

import numpy as np
import pytest
import torch
from torch import nn

from hf_circuit_sparsity import RCDSparseOptimizer, TopKAdamW
from hf_circuit_sparsity.optim.projection import project_topk_reference_
from tests.optim.conftest import random_parameters

PENALTY = 0.1
OPTIMUM = (torch.arange(10, dtype=torch.float64) - PENALTY / 2).clamp(min=0)  # soft threshold


@pytest.fixture(scope="module")
def evaluations_of_the_loop():
    """Function evaluations of the loop the optimizer grew out of, to within 1e-2 of the optimum.

    Its test for convergence is left out: it stops the loop at the first coordinate that rests.
    """
    random, x, eta = np.random.RandomState(0), np.zeros(10), 0.01

    def function(x):
        return np.sum((x - np.arange(10)) ** 2) + PENALTY * np.sum(np.abs(x))

    for step in range(1, 50_000):
        i = random.randint(10)
        moved = x.copy()
        moved[i] += eta * 0.1
        x[i] -= eta * (function(moved) - function(x)) / (eta * 0.1)
        x[i] = 0.0 if np.abs(x[i]) < 1e-4 else x[i]
        if np.abs(x - OPTIMUM.numpy()).max() < 1e-2:
            return 2 * step
    raise AssertionError("the loop did not come near")


@pytest.mark.parametrize(
    ("tolerance", "share", "settings"),
    [
        *((1e-4, 1 / 20, {"lr": 0.5, "selection": selection, "magnitude_floor": 0.5})
          for selection in ("uniform", "magnitude", "gradient", "cyclic")),
        (1e-2, 1.0, {"lr": 0.01, "block_fraction": 1.0}),  # the loop's own step size
        *((1e-4, None, {"lr": 0.3, "update": "adam", "eps": 1e-8, "move_active": True,
                        "block_fraction": 0.3, "block_steps": steps}) for steps in (1, 4)),
    ],
)  # fmt: skip
def test_reaches_the_analytic_optimum_and_beats_the_loop_it_grew_out_of(
    tolerance, share, settings, evaluations_of_the_loop
):
    x = nn.Parameter(torch.zeros(10, dtype=torch.float64))
    defaults = {"update": "plain", "move_active": False, "block_fraction": 1 / 10}
    optimizer = RCDSparseOptimizer(
        [x], block="entries", l1=PENALTY, clip_threshold=1e-4, **{**defaults, **settings}
    )
    evaluations = 0
    for _ in range(600):
        # Only what derivatives along the chosen coordinates tell, each as two evaluations.
        chosen = optimizer.sparse_state(x).own_block.ids
        evaluations += 2 * len(chosen)
        known = slice(None) if share is None else chosen
        x.grad = torch.zeros_like(x)
        x.grad[known] = 2 * (x.detach() - torch.arange(10))[known]
        optimizer.step()
        if share is not None and (x.detach() - OPTIMUM).abs().max() < tolerance:
            break
    assert (x.detach() - OPTIMUM).abs().max() < tolerance
    assert x[0] == 0  # exactly: the penalty keeps it there
    assert share is None or evaluations < share * evaluations_of_the_loop


def test_rows_are_outputs_in_either_layout():
    matrix = nn.Parameter(torch.zeros(8, 12))
    for row_dim, kind, dim, size in (
        (0, "rows", 0, 8), (1, "rows", 1, 12), (0, "columns", 1, 12), (1, "columns", 0, 8),
    ):  # fmt: skip
        optimizer = RCDSparseOptimizer([matrix], row_dim=row_dim, block=kind, block_fraction=0.25)
        block = optimizer.sparse_state(matrix).own_block
        assert (block.dim, len(block.ids)) == (dim, size // 4)


def test_with_everything_in_the_block_adam_moves_as_torch_does():
    """As long as nothing is clipped, a full block is AdamW on all that is not zero."""
    g = torch.Generator().manual_seed(0)
    ours, theirs = (nn.Parameter(torch.randn(9, 7, generator=g.manual_seed(1))) for _ in range(2))
    norm, norm_theirs = nn.Parameter(torch.ones(7)), nn.Parameter(torch.ones(7))
    settings = {"lr": 0.03, "betas": (0.8, 0.99), "eps": 0.01, "weight_decay": 0.2}
    optimizer = RCDSparseOptimizer(
        [{"params": [ours]}, {"params": [norm], "sparse": False}],
        block_fraction=1.0, normalize_gradients="always", **settings,
    )  # fmt: skip
    reference = TopKAdamW([theirs, norm_theirs], target_density=1.0, **settings)
    for step in range(8):
        for p, q in ((ours, theirs), (norm, norm_theirs)):
            p.grad = torch.randn(p.shape, generator=g.manual_seed(step))
            q.grad = p.grad.clone()
        optimizer.step()
        reference.step()
        assert optimizer.grad_rms == pytest.approx(reference.grad_rms, rel=1e-5)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(norm, norm_theirs)


BUDGET = {"target_density": 0.1}


@pytest.mark.parametrize(
    "settings",
    [
        BUDGET,
        {**BUDGET, "min_nonzeros": 2},
        {**BUDGET, "min_nonzeros": 3, "row_dim": 1, "block_steps": 3},
        {"block": "columns", "block_steps": 2, "l1": 0.02, "clip_threshold": 0.3,
         "weight_decay": 0.1},
        {**BUDGET, "update": "plain", "block_steps": 3, "selection": "gradient"},
        {**BUDGET, "selection": "gradient", "greedy_fraction": 0.1},
        {**BUDGET, "block": "entries", "move_active": False, "selection": "magnitude"},
        {**BUDGET, "selection": "gradient", "replace_fraction": 0.2},
        {**BUDGET, "selection": "gradient", "replace_fraction": 0.1, "grace_steps": 5,
         "block_steps": 2, "min_nonzeros": 2},
        {**BUDGET, "grace_steps": 4},
    ],
)  # fmt: skip
def test_steps_are_those_of_a_plain_dense_reference(settings):
    """Dense moments, dense masks and a sort, against what touches active coordinates and block."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(24, 30, generator=g, dtype=torch.float64)
    # Columns and rows of unequal size, so that some fall short of the minimum.
    x *= torch.logspace(-2, 0, 24, dtype=torch.float64)[:, None]
    x *= torch.rand(24, 30, generator=g) < 0.15
    weight = nn.Parameter(x.clone())
    settings = {"lr": 0.5, "betas": (0.8, 0.9), "eps": 0.1, "block_fraction": 1 / 6, **settings}
    optimizer = RCDSparseOptimizer([weight], **settings)
    (s,), (beta1, beta2) = optimizer.param_groups, settings["betas"]
    adam = s["update"] == "adam"

    def shrunk(x, step):
        x = x.sign() * (x.abs() - step * s["l1"]).clamp(min=0)
        return torch.where(x.abs() < s["clip_threshold"], 0.0, x)

    active, grown = x != 0, 0
    first, second, age, total, squares = (torch.zeros_like(x) for _ in range(5))
    for step in range(1, 25):
        weight.grad = gradient = torch.randn(24, 30, generator=g, dtype=torch.float64)
        in_block = torch.zeros(24, 30, dtype=torch.bool)
        in_block.view(-1)[optimizer.sparse_state(weight).own_block.index()] = True
        moving = active & in_block if not s["move_active"] else active
        first = torch.where(moving, beta1 * first + (1 - beta1) * gradient, first)
        second = torch.where(moving, beta2 * second + (1 - beta2) * gradient**2, second)
        age = age + moving
        size = s["lr"] / ((second / (1 - beta2**age)).sqrt() + s["eps"]) if adam else s["lr"]
        direction = first / (1 - beta1**age) if adam else gradient
        moved = shrunk(x * (1 - s["lr"] * s["weight_decay"]) - size * direction, size)
        x = torch.where(moving, moved, x)
        total, squares, stayed = total + gradient, squares + gradient**2, s["block_steps"]
        if step % stayed == 0:  # the zeros of the block move, by the mean of what was seen
            mean, square = total / stayed, squares / stayed
            size = s["lr"] / (square.sqrt() + s["eps"]) if adam else s["lr"]
            zeros = torch.where(in_block & ~active, shrunk(-size * mean, size), 0.0)
            if s["selection"] == "gradient":
                count = round(int(in_block.sum()) * s["greedy_fraction"])
                if s["replace_fraction"]:
                    count = round(int(active.sum()) * s["replace_fraction"])
                least = (mean * (zeros != 0)).abs().flatten().topk(count).values[-1]
                zeros = torch.where(mean.abs() >= least, zeros, 0.0)
            x = torch.where(active, x, zeros)
            first = torch.where(active, first, mean * (1 - beta1**stayed))
            second = torch.where(active, second, square * (1 - beta2**stayed))
            young = active & (age < min(s["grace_steps"], int((age * active).max())))
            age = torch.where(active, age, stayed)
            if s["target_density"]:
                rank = torch.where(young, torch.inf, x.abs()).clamp(max=1e300)
                if s["replace_fraction"]:
                    rank = torch.where(~active & (x != 0), 1e300, rank)
                project_topk_reference_(rank, 72, s["min_nonzeros"], s["row_dim"])
                x = torch.where(rank != 0, x, 0.0)
            grown += int(((x != 0) & ~active).sum())
            active = x != 0
            total, squares = torch.zeros_like(x), torch.zeros_like(x)
        optimizer.step()
        assert torch.equal(weight != 0, x != 0)
        torch.testing.assert_close(weight.detach(), x, rtol=1e-5, atol=1e-6)
        assert torch.equal(optimizer.state[weight].active, active.flatten().nonzero().flatten())
        assert optimizer.density == int(active.sum()) / 720
        for value in optimizer.state[weight].to_dict().values():  # nothing of the matrix's size
            assert not torch.is_tensor(value) or value.numel() <= max(180, int(active.sum()))
    assert grown > 10


LOOKS_ALL_AT_ONCE = {"replace_fraction": 0.2, "block_fraction": 1.0, "rest_steps": 2}


@pytest.mark.parametrize(
    ("settings", "looks"),
    [
        ({**LOOKS_ALL_AT_ONCE, "selection": "gradient"}, (1, 4, 7)),
        ({**LOOKS_ALL_AT_ONCE, "selection": "uniform"}, (1, 4, 7)),
        ({"explore_end": 0.0}, ()),
    ],
    ids=["RigL", "SET", "frozen"],
)
def test_other_ways_to_choose_a_mask_are_settings(settings, looks):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, 40, generator=generator)
    x.view(-1)[torch.randperm(1200, generator=generator)[300:]] = 0
    weight = nn.Parameter(x)
    # So slow that the smallest before a step are about the smallest when it drops them.
    optimizer = RCDSparseOptimizer(
        [weight], lr=1e-7, target_density=1 / 4, total_steps=8, **settings
    )
    for step in range(1, 8):
        before = weight.detach().clone().flatten()
        weight.grad = torch.randn(30, 40, generator=generator)
        promise = torch.where(before == 0, weight.grad.abs().flatten(), 0.0)
        optimizer.step()
        after = weight.detach().flatten() != 0
        grown, dropped = after & (before == 0), ~after & (before != 0)
        # Half a cosine over the 8 steps, of 300 active coordinates.
        count = round(30 * (1 + math.cos(math.pi * step / 8))) if step in looks else 0
        assert grown.sum() == dropped.sum() == count
        stays = (before != 0) & ~dropped
        assert not count or before[dropped].abs().max() <= before[stays].abs().min() + 1e-5
        best = set(promise.topk(count).indices.tolist())
        assert (best == set(grown.nonzero().flatten().tolist())) == (
            settings.get("selection") == "gradient" or not count
        )


def test_seeds_choose_other_blocks():
    chosen = []
    for seed in (0, 0, 1):
        optimizer = RCDSparseOptimizer(p := random_parameters(), block_fraction=0.1, seed=seed)
        chosen.append([optimizer.sparse_state(q).own_block.ids.tolist() for q in p])
    assert chosen[0] == chosen[1] != chosen[2]


def test_the_budget_falls_by_equal_factors_and_exploring_ends():
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(0.1 * torch.randn(32, 32, generator=generator))
    optimizer = RCDSparseOptimizer(
        [weight], lr=1.0, update="plain", start_density=1 / 2, target_density=1 / 8, anneal_end=0.5,
        explore_end=0.75, total_steps=16, block_fraction=1 / 4,
    )  # fmt: skip
    nonzeros, blocks, masks = [], [], []
    for _ in range(16):
        weight.grad = torch.randn(32, 32, generator=generator)
        blocks.append(optimizer.sparse_state(weight).own_block.numel)
        optimizer.step()
        nonzeros.append(int(torch.count_nonzero(weight)))
        masks.append(weight.detach() != 0)
    expected = [round(1024 * 0.5 * 0.25 ** (step / 8)) for step in range(1, 9)]
    assert nonzeros == [*expected, *[128] * 8]
    assert blocks == [256] * 12 + [0] * 4
    assert not torch.equal(masks[7], masks[11])
    assert torch.equal(masks[12], masks[15])  # only what is active moves


@pytest.mark.parametrize(
    ("parameters", "settings", "named"),
    [
        ([("embed.T", torch.zeros(4, 5).T)], {}, r"embed\.T"),
        ([torch.zeros(3), torch.zeros(0)], {}, "parameter 1"),
        ([("experts", torch.zeros(2, 3, 4))], {"row_dim": 1}, "experts"),
    ],
)
def test_parameters_without_a_rule_are_named(parameters, settings, named):
    parameters = [
        (p[0], nn.Parameter(p[1])) if isinstance(p, tuple) else nn.Parameter(p) for p in parameters
    ]
    with pytest.raises(ValueError, match=named):
        RCDSparseOptimizer(parameters, **settings)
