import tracemalloc

import pytest
import torch

from hf_circuit_sparsity.optim.keep_largest import keep_largest, keep_largest_reference
from hf_circuit_sparsity.optim.projection import (
    nonzero_budget,
    project_bisection_,
    project_topk_,
    project_topk_each_,
    project_topk_reference_,
)

pytestmark = pytest.mark.usefixtures("either_path")


def matrices():
    """Matrices that are awkward, each in its way, by name."""
    g = torch.Generator().manual_seed(0)
    normal = torch.randn(90, 70, generator=g)
    heavy = normal**5
    heavy[7] = 0
    heavy[:, 3] = 0
    return {
        "normal": normal,
        "ties": torch.randint(-3, 4, (90, 70), generator=g).float(),
        "constant": torch.full((90, 70), -0.5),
        "zeros": torch.zeros(90, 70),
        "mostly zeros": normal * (torch.rand(90, 70, generator=g) < 0.05),
        "rows of unequal size": normal * torch.logspace(-3, 0, 90)[:, None],
        "columns of unequal size": normal * torch.logspace(-3, 0, 70),
        "heavy tails, dead row and column": heavy,
        "one row": normal[:1],
        "one column": normal[:, :1],
        "one entry": normal[:1, :1],
    }


MATRICES = matrices()


def assert_as_defined(weight, k, min_nonzeros=0, row_dim=0, threads=(1,)):
    expected = weight.clone()
    project_topk_reference_(expected, k, min_nonzeros, row_dim)
    for count in threads:
        torch.set_num_threads(count)
        for project in (project_topk_, project_bisection_)[: weight.ndim]:
            got = weight.clone()
            project(got, k, min_nonzeros, row_dim)
            assert torch.equal(got, expected), (project.__name__, k, min_nonzeros, row_dim)
    return expected


THREE = [[9.0, -8.0, 7.0], [1.0, -3.0, 2.0], [0.5, 0.0, 0.0]]


@pytest.mark.parametrize(
    ("weight", "settings", "expected"),
    [
        (THREE, {"k": 4}, [[9, -8, 7], [0, -3, 0], [0, 0, 0]]),
        # Two per row are safe (the last row has only one): 9 8, 3 2, 0.5. One place is left.
        (THREE, {"k": 6, "min_nonzeros": 2}, [[9, -8, 7], [0, -3, 2], [0.5, 0, 0]]),
        # Stored inputs × outputs, the rows are the columns: 9, 8, 7 and nothing else fits.
        (THREE, {"k": 1, "min_nonzeros": 1, "row_dim": 1}, [[9, -8, 7], [0, 0, 0], [0, 0, 0]]),
        # Of equal magnitudes the lowest flat index wins, whatever the sign.
        ([[1.0, -2.0], [2.0, -2.0]], {"k": 2}, [[0, -2], [2, 0]]),
    ],
)
def test_reference_on_cases_worked_out_by_hand(weight, settings, expected):
    assert assert_as_defined(torch.tensor(weight), **settings).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", MATRICES)
def test_fast_paths_agree_with_the_reference(name, dtype):
    matrix = MATRICES[name].to(dtype).contiguous()
    n = matrix.numel()
    for k in sorted({0, 1, n // 64, n // 10, min(n, 250), n // 2, n}):
        for min_nonzeros, row_dim in ((0, 0), (1, 1), (4, 0), (4, 1), (1000, 0)):
            assert_as_defined(matrix, k, min_nonzeros, row_dim)


@pytest.mark.parametrize("row_dim", [0, 1])
@pytest.mark.parametrize("density", [0.001, 1 / 64, 0.3, 0.9])
def test_large_matrices_and_threads(density, row_dim):
    weight = torch.randn(1024, 700, generator=torch.Generator().manual_seed(1))
    k = nonzero_budget(weight.numel(), density)
    for min_nonzeros in (0, 4):
        expected = assert_as_defined(weight, k, min_nonzeros, row_dim, threads=(3, 1))
        assert torch.count_nonzero(expected) == max(k, min_nonzeros * weight.shape[row_dim])


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_entries_at_even_distances_may_be_unlike_the_others(factor):
    """Whichever of them a sample takes, it misleads: that costs time, not exactness."""
    w = torch.rand(90, 70, generator=torch.Generator().manual_seed(2)) + 1.0
    for stride in range(3, 34, 2):
        odd = w.clone()
        odd.view(-1)[::stride] *= factor
        for k in (50, 3000, 6000):
            for min_nonzeros in (0, 4):
                assert_as_defined(odd, k, min_nonzeros)


def test_other_shapes_and_layouts():
    g = torch.Generator().manual_seed(4)
    assert int((assert_as_defined(torch.randn(200, generator=g), 7) != 0).sum()) == 7
    cube = torch.randn(5, 6, 7, generator=g)
    expected = assert_as_defined(cube.view(5, 42), 20, 3)
    project_topk_(cube, 20, min_nonzeros=3)
    assert torch.equal(cube.view(5, 42), expected)

    storage = torch.randn(40, 60, generator=g)
    transposed = storage.T  # not contiguous: the result must land in the storage all the same
    expected = transposed.clone()
    project_topk_(transposed, 100, min_nonzeros=2)
    project_topk_reference_(expected, 100, min_nonzeros=2)
    assert torch.equal(storage, expected.T)
    project_topk_(torch.zeros(0, 4), 0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "project", [project_topk_, project_topk_reference_, lambda w, k: project_bisection_(w, k, 0, 0)]
)
@pytest.mark.parametrize("k", [0, 5, 5000, 9000])
def test_what_is_not_finite_raises_and_leaves_the_weight_alone(bad, project, k):
    w = torch.randn(100, 90, generator=torch.Generator().manual_seed(6))
    w[17, 5] = bad
    before = w.clone()
    where = "row 17, column 5" if project is project_topk_ else None
    with pytest.raises(ValueError, match=where):
        project(w, k)
    assert torch.equal(w.nan_to_num(7.0, 8.0, 9.0), before.nan_to_num(7.0, 8.0, 9.0))


def test_memory_stays_below_the_matrix():
    w = torch.randn(2048, 512, generator=torch.Generator().manual_seed(7))
    for k in (w.numel() // 64, w.numel() // 2):
        tracemalloc.start()
        project_topk_(w.clone(), k, min_nonzeros=4)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < w.numel() * w.element_size()


@pytest.mark.parametrize(
    ("arguments", "error", "word"),
    [
        ((torch.ones(3, 3), 10), ValueError, "k=10"),
        ((torch.ones(3, 3), -1), ValueError, "k=-1"),
        ((torch.ones(3, 3), 2, -1), ValueError, "min_nonzeros=-1"),
        ((torch.ones(9), 2, 1), ValueError, "min_nonzeros=1"),
        ((torch.ones(3, 3), 2, 1, 2), ValueError, "row_dim=2"),
        ((torch.ones(3, 3, 3), 2, 1, 1), ValueError, "row_dim=1"),
        ((torch.ones(3, 3, dtype=torch.int64), 2), TypeError, "int64"),
        (([1.0, 2.0], 1), TypeError, "list"),
    ],
)
def test_bad_arguments_are_named(arguments, error, word):
    for project in (project_topk_, project_topk_reference_):
        with pytest.raises(error, match=word):
            project(*arguments)


def test_budget_is_at_least_one():
    assert nonzero_budget(1000, 0.29) == 290
    assert nonzero_budget(10, 1 / 64) == 1
    assert nonzero_budget(10, 1.0) == 10


@pytest.mark.parametrize("row_dim", [0, 1])
def test_rows_of_every_kind_get_their_minimum(row_dim):
    # Long rows, so that the minimum is settled on the list; some rows are almost empty, some far
    # larger than the rest, some full of ties.
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(96, 1024, generator=generator)
    rows[:16] *= torch.rand(16, 1024, generator=generator) < 0.003
    rows[16:24] *= 50.0
    rows[24:40] *= 0.01
    rows[40:56] = torch.randint(-3, 4, (16, 1024), generator=generator).float()
    weight = rows if row_dim == 0 else rows.T.contiguous()
    for k in (96, 500, 2000, 9000):
        for minimum in (1, 4, 9):
            assert_as_defined(weight, k, minimum, row_dim)


def test_keep_largest_is_its_reference():
    generator = torch.Generator().manual_seed(0)

    def below(n):
        return int(torch.randint(0, n, (1,), generator=generator))

    for number in range(400):
        n, k, minimum = 1 + below(60), below(60), below(5)
        values = torch.randn(n, generator=generator)
        if number % 2:
            values = (2 * values).round()  # many are equal, or zero
        rows = torch.randint(0, 1 + n // 3, (n,), generator=generator)
        kept = keep_largest(values, k, rows, minimum)
        assert torch.equal(kept, keep_largest_reference(values, k, rows, minimum))


def test_several_at_once_are_each_as_defined():
    g = torch.Generator().manual_seed(8)
    weights = [torch.randn(40, 60, generator=g), torch.randn(60, 40, generator=g),
               torch.randn(200, generator=g), torch.randn(30, 50, generator=g).T,
               torch.zeros(0, 4)]  # fmt: skip
    settings = ([90, 100, 7, 60, 0], [4, 3, 0, 2, 0], [0, 1, 0, 0, 0])
    expected = [weight.clone() for weight in weights]
    for weight, *case in zip(expected, *settings, strict=True):
        project_topk_reference_(weight, *case)
    project_topk_each_(weights, *settings)
    assert all(map(torch.equal, weights, expected))


def test_on_the_cpu_those_before_one_that_is_not_finite_are_done():
    weights = [torch.randn(9, 7).T, torch.full((3, 3), torch.nan)]
    with pytest.raises(ValueError, match=r"not finite|NaN"):
        project_topk_each_(weights, [5, 2], [0, 0], [0, 0])
    assert torch.count_nonzero(weights[0]) == 5


def test_parameters_are_projected_by_several_threads(monkeypatch):
    weights = [torch.nn.Parameter(torch.randn(9, 7)) for _ in range(4)]
    expected = [weight.detach().clone() for weight in weights]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    project_topk_each_(weights, [5] * 4, [0] * 4, [0] * 4)
    for weight in expected:
        project_topk_reference_(weight, 5)
    assert all(map(torch.equal, weights, expected))


def test_of_several_none_is_changed_if_one_argument_is_wrong():
    weights = [torch.ones(3, 3), torch.ones(3, 3)]
    with pytest.raises(ValueError, match="k=10"):
        project_topk_each_(weights, [2, 10], [0, 0], [0, 0])
    assert all(weight.all() for weight in weights)
