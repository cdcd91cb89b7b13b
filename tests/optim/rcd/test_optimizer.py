import numpy as np
import pytest
import torch
from torch import nn

from hf_circuit_sparsity import RCDSparseOptimizer, TopKAdamW
from hf_circuit_sparsity.optim.projection import nonzero_budget, project_topk_reference_
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


def test_only_what_is_active_or_chosen_moves():
    matrix = nn.Parameter(torch.zeros(16, 10))
    with torch.no_grad():
        matrix[3, 3] = matrix[5, 8] = 1.0
    optimizer = RCDSparseOptimizer([matrix], block="rows", block_fraction=1 / 8)
    rows = optimizer.sparse_state(matrix).own_block.ids
    assert len(rows) == 2
    matrix.grad = torch.ones_like(matrix)
    optimizer.step()
    expected = torch.zeros(16, 10, dtype=torch.bool)
    expected[rows] = True
    expected[3, 3] = expected[5, 8] = True
    assert torch.equal(matrix != 0, expected)
    for value in optimizer.state[matrix].to_dict().values():  # nothing of the matrix's size is kept
        assert not torch.is_tensor(value) or value.numel() <= 2 * 10 + 2

    matrix = nn.Parameter(torch.ones(16, 10))
    optimizer = RCDSparseOptimizer([matrix], block="columns", block_fraction=0.2, move_active=False)
    columns = optimizer.sparse_state(matrix).own_block.ids
    matrix.grad = torch.ones_like(matrix)
    optimizer.step()
    moved = (matrix != 1).nonzero()[:, 1].unique()
    assert torch.equal(moved, columns)


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


def test_zeros_wait_for_the_end_of_the_stay_and_move_by_the_mean():
    matrix = nn.Parameter(torch.zeros(4, 3))
    optimizer = RCDSparseOptimizer([matrix], lr=0.1, update="plain", block_steps=3, seed=2)
    row = int(optimizer.sparse_state(matrix).own_block.ids)
    for gradient in (1.0, 2.0, 6.0):
        assert not matrix.any()
        assert optimizer.sparse_state(matrix).own_block.ids == row
        matrix.grad = torch.full_like(matrix, gradient)
        optimizer.step()
    torch.testing.assert_close(matrix[row].detach(), torch.full((3,), -0.3))
    assert int(torch.count_nonzero(matrix)) == 3


def test_gauss_southwell_moves_the_largest_gradients_only():
    matrix = nn.Parameter(torch.zeros(4, 10))
    optimizer = RCDSparseOptimizer(
        [matrix], update="plain", selection="gradient", block_fraction=0.5, greedy_fraction=0.1
    )
    rows = optimizer.sparse_state(matrix).own_block.ids
    matrix.grad = torch.randn(4, 10, generator=torch.Generator().manual_seed(0))
    best = matrix.grad[rows].abs().flatten().topk(2).values.min()
    optimizer.step()
    moved = matrix != 0
    assert int(moved.sum()) == 2
    assert matrix.grad[moved].abs().min() == best


def test_budget_is_kept_and_what_grows_replaces_the_smallest():
    g = torch.Generator().manual_seed(0)
    thin = torch.randn(20, 30, generator=g) * (torch.rand(20, 30, generator=g) < 0.2)
    matrix = nn.Parameter(thin)
    settings = {"lr": 0.8, "block_fraction": 0.5, "target_density": 0.1, "min_nonzeros": 1}
    optimizer = RCDSparseOptimizer([matrix], **settings)
    grown = 0
    for _ in range(10):
        before = matrix != 0
        matrix.grad = torch.randn(20, 30, generator=g)
        optimizer.step()
        after = matrix != 0
        assert int(after.sum()) == nonzero_budget(600, 0.1)
        assert after.any(dim=1).all()
        assert torch.equal(optimizer.state[matrix].active, after.flatten().nonzero().flatten())
        grown += int((after & ~before).sum())
    assert grown > 10
    assert optimizer.density == 0.1


@pytest.mark.parametrize(("minimum", "row_dim"), [(0, 0), (2, 0), (3, 1)])
def test_steps_are_those_of_a_plain_dense_reference(minimum, row_dim):
    """Dense moments, dense masks and a sort, against what touches active coordinates and block."""
    g = torch.Generator().manual_seed(0)
    lr, beta1, beta2, eps, budget = 0.5, 0.8, 0.9, 0.1, 72
    x = torch.randn(24, 30, generator=g, dtype=torch.float64)
    # Columns and rows of unequal size, so that some fall short of the minimum.
    x *= torch.logspace(-2, 0, 24, dtype=torch.float64)[:, None]
    x *= torch.rand(24, 30, generator=g) < 0.15
    first, second, age = torch.zeros_like(x), torch.zeros_like(x), torch.zeros_like(x)
    weight = nn.Parameter(x.clone())
    optimizer = RCDSparseOptimizer(
        [weight], lr=lr, betas=(beta1, beta2), eps=eps, block_fraction=1 / 6, row_dim=row_dim,
        target_density=0.1, min_nonzeros=minimum,
    )  # fmt: skip
    for _ in range(25):
        gradient = torch.randn(24, 30, generator=g, dtype=torch.float64)
        in_block = torch.zeros(24, 30, dtype=torch.bool)
        in_block.index_fill_(row_dim, optimizer.sparse_state(weight).own_block.ids, True)
        moving = in_block | (x != 0)
        first = torch.where(moving, beta1 * first + (1 - beta1) * gradient, 0.0)
        second = torch.where(moving, beta2 * second + (1 - beta2) * gradient**2, 0.0)
        age = torch.where(moving, age + 1, 0.0)
        direction = first / (1 - beta1**age) / ((second / (1 - beta2**age)).sqrt() + eps)
        x = torch.where(moving, x - lr * direction, x)
        project_topk_reference_(x, budget, minimum, row_dim)
        first, second, age = (torch.where(x != 0, t, 0.0) for t in (first, second, age))

        weight.grad = gradient
        optimizer.step()
        assert torch.equal(weight != 0, x != 0)
        torch.testing.assert_close(weight.detach(), x, rtol=1e-5, atol=1e-6)


def test_clip_threshold_empties_what_is_small():
    matrix = nn.Parameter(torch.linspace(0.001, 0.1, 40).view(4, 10))
    optimizer = RCDSparseOptimizer([matrix], lr=0.01, update="plain", clip_threshold=0.05)
    matrix.grad = torch.zeros_like(matrix)
    optimizer.step()
    assert torch.equal(matrix != 0, torch.linspace(0.001, 0.1, 40).view(4, 10) >= 0.05)
    assert len(optimizer.state[matrix].active) == int(torch.count_nonzero(matrix))


def test_positions_survive_loading_into_half_precision():
    weight = nn.Parameter(torch.zeros(40, 30, dtype=torch.bfloat16))
    with torch.no_grad():
        weight[39, 28] = 1.0  # position 1198 is no bfloat16
    optimizer = RCDSparseOptimizer([weight])
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    again = RCDSparseOptimizer([weight])
    again.load_state_dict(optimizer.state_dict())
    assert again.sparse_state(weight).active.tolist() == [1198]
    assert again.state[weight].moments["exp_avg"].dtype == torch.float32


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
