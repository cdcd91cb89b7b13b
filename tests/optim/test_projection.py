import tracemalloc

import numpy as np
import pytest
import torch

from hf_circuit_sparsity.optim import projection_cpu
from hf_circuit_sparsity.optim.keep_largest import infinity_bits
from hf_circuit_sparsity.optim.projection import (
    nonzero_budget,
    project_bisection_,
    project_topk_,
    project_topk_reference_,
)

pytestmark = pytest.mark.usefixtures("either_path")


@pytest.fixture
def small_pieces(monkeypatch):
    """Make the sampling and the cutting into pieces happen on matrices small enough for tests."""
    monkeypatch.setattr(projection_cpu, "_SMALL", 300)
    monkeypatch.setattr(projection_cpu, "_SAMPLE_STRIDE", 3)
    monkeypatch.setattr(projection_cpu, "_SAMPLE_LIMIT", 256)
    monkeypatch.setattr(projection_cpu, "_PIECE", 512)


def matrices(dtype=torch.float32):
    """Matrices that are awkward, each in its way, as (name, tensor)."""
    g = torch.Generator().manual_seed(0)
    normal = torch.randn(60, 45, generator=g)
    heavy = normal**5
    heavy[7] = 0
    heavy[:, 3] = 0
    found = {
        "normal": normal,
        "ties": torch.randint(-3, 4, (60, 45), generator=g).float(),
        "constant": torch.full((60, 45), -0.5),
        "zeros": torch.zeros(60, 45),
        "mostly zeros": normal * (torch.rand(60, 45, generator=g) < 0.05),
        "rows of unequal size": normal * torch.logspace(-3, 0, 60)[:, None],
        "columns of unequal size": normal * torch.logspace(-3, 0, 45),
        "heavy tails, dead row and column": heavy,
        "one row": normal[:1],
        "one column": normal[:, :1],
        "one entry": normal[:1, :1],
    }
    return [(name, matrix.to(dtype).contiguous()) for name, matrix in found.items()]


def test_reference_on_a_case_worked_out_by_hand():
    w = torch.tensor([[9.0, -8.0, 7.0], [1.0, -3.0, 2.0], [0.5, 0.0, 0.0]])
    project_topk_reference_(w, k=4)
    assert w.tolist() == [[9, -8, 7], [0, -3, 0], [0, 0, 0]]

    # Two per row are safe (the last row has only one nonzero): 9 8, 3 2, 0.5. One place is left.
    w = torch.tensor([[9.0, -8.0, 7.0], [1.0, -3.0, 2.0], [0.5, 0.0, 0.0]])
    project_topk_reference_(w, k=6, min_nonzeros=2)
    assert w.tolist() == [[9, -8, 7], [0, -3, 2], [0.5, 0, 0]]

    # Stored inputs × outputs, the rows are the columns: 9, 8, 7 and nothing else fits.
    w = torch.tensor([[9.0, -8.0, 7.0], [1.0, -3.0, 2.0], [0.5, 0.0, 0.0]])
    project_topk_reference_(w, k=1, min_nonzeros=1, row_dim=1)
    assert w.tolist() == [[9, -8, 7], [0, 0, 0], [0, 0, 0]]

    # Of equal magnitudes the lowest flat index wins, whatever the sign.
    w = torch.tensor([[1.0, -2.0], [2.0, -2.0]])
    project_topk_reference_(w, k=2)
    assert w.tolist() == [[0, -2], [2, 0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("pieces", ["default", "small"])
def test_fast_paths_agree_with_the_reference(dtype, pieces, request):
    if pieces == "small":
        request.getfixturevalue("small_pieces")
    for name, matrix in matrices(dtype):
        n = matrix.numel()
        for k in sorted({0, 1, n // 64, n // 10, min(n, 250), n // 2, n}):
            for min_nonzeros, row_dim in ((0, 0), (1, 1), (4, 0), (4, 1), (1000, 0)):
                expected, got, bisected = matrix.clone(), matrix.clone(), matrix.clone()
                project_topk_reference_(expected, k, min_nonzeros, row_dim)
                project_topk_(got, k, min_nonzeros, row_dim)
                project_bisection_(bisected, k, min_nonzeros, row_dim)
                case = (name, k, min_nonzeros, row_dim)
                assert torch.equal(got, expected), case
                assert torch.equal(bisected, expected), case


def test_large_matrix_keeps_exactly_the_budget_and_the_largest():
    w = torch.randn(1024, 700, generator=torch.Generator().manual_seed(1))
    assert w.numel() > projection_cpu._SAMPLE_LIMIT * 8  # so that the bracket is really a sample's
    for density in (0.001, 1 / 64, 0.3, 0.9):
        k = nonzero_budget(w.numel(), density)
        projected, expected = w.clone(), w.clone()
        project_topk_(projected, k)
        kept = projected != 0
        assert int(kept.sum()) == k
        assert torch.equal(projected[kept], w[kept])
        assert w[kept].abs().min() > w[~kept].abs().max()

        projected = w.clone()
        project_topk_(projected, k, min_nonzeros=4)
        project_topk_reference_(expected, k, min_nonzeros=4)
        assert int((projected != 0).sum()) == max(k, 4 * 1024)
        assert int((projected != 0).sum(dim=1).min()) >= 4
        assert torch.equal(projected, expected)


@pytest.mark.parametrize("hidden", ["large entries", "small entries"])
def test_a_sample_that_misleads_costs_time_not_exactness(small_pieces, hidden, monkeypatch):
    g = torch.Generator().manual_seed(2)
    w = torch.rand(90, 70, generator=g) + 1.0
    bits = w.view(-1).view(torch.int32).numpy()
    matrix = projection_cpu._Matrix(bits, 70, 0, 0, infinity_bits(w.dtype), None)
    seen = projection_cpu._sample(matrix)
    stride = next(s for s in range(2, 999) if np.array_equal(bits[::s] & 0x7FFFFFFF, seen))
    reaches, bracket = [], projection_cpu._bracket
    monkeypatch.setattr(
        projection_cpu, "_bracket", lambda *a: (reaches.append(a[-1]), bracket(*a))[1]
    )
    # All that the sample sees is tiny, or all that it sees is huge.
    w.view(-1)[::stride] *= 1e-6 if hidden == "large entries" else 1e6
    for k in (50, 3000, 6000):
        for min_nonzeros in (0, 4):
            got, expected = w.clone(), w.clone()
            project_topk_(got, k, min_nonzeros)
            project_topk_reference_(expected, k, min_nonzeros)
            assert torch.equal(got, expected)
    assert max(reaches) > 1  # a first bracket did miss


def test_conv1d_orientation_is_the_transpose_of_linear():
    w = torch.randn(30, 50, generator=torch.Generator().manual_seed(3))
    linear, conv = w.clone(), w.T.contiguous()
    project_topk_(linear, 130, min_nonzeros=4, row_dim=0)
    project_topk_(conv, 130, min_nonzeros=4, row_dim=1)
    assert int((linear != 0).sum()) == 130
    assert torch.equal(conv, linear.T)


def test_other_shapes_and_layouts():
    g = torch.Generator().manual_seed(4)
    vector = torch.randn(200, generator=g)
    project_topk_(vector, 7)
    assert int((vector != 0).sum()) == 7

    cube, expected = torch.randn(2, 5, 6, 7, generator=g)
    cube, expected = cube.clone(), cube.clone()
    project_topk_(cube, 20, min_nonzeros=3)
    project_topk_reference_(expected, 20, min_nonzeros=3)
    assert torch.equal(cube, expected)

    storage = torch.randn(40, 60, generator=g)
    transposed = storage.T  # not contiguous: the result must land in the storage all the same
    expected = transposed.clone()
    project_topk_(transposed, 100, min_nonzeros=2)
    project_topk_reference_(expected, 100, min_nonzeros=2)
    assert torch.equal(storage, expected.T)

    empty = torch.zeros(0, 4)
    project_topk_(empty, 0)


def test_projecting_twice_changes_nothing():
    w = torch.randn(100, 100, generator=torch.Generator().manual_seed(5))
    project_topk_(w, 700, min_nonzeros=4)
    again = w.clone()
    project_topk_(again, 700, min_nonzeros=4)
    assert torch.equal(w, again)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "project", [project_topk_, project_topk_reference_, lambda w, k: project_bisection_(w, k, 0, 0)]
)
@pytest.mark.parametrize("k", [0, 5, 5000, 9000])
def test_what_is_not_finite_raises_and_leaves_the_weight_alone(bad, project, k):
    w = torch.randn(100, 90, generator=torch.Generator().manual_seed(6))
    w[17, 5] = bad
    before = w.clone()
    with pytest.raises(ValueError, match="NaN or infinity"):
        project(w, k)
    assert torch.equal(w.nan_to_num(7.0, 8.0, 9.0), before.nan_to_num(7.0, 8.0, 9.0))


def test_error_says_where_it_is_not_finite():
    w = torch.zeros(100, 90)
    w[17, 5] = float("nan")
    with pytest.raises(ValueError, match=r"row 17, column 5"):
        project_topk_(w, 10)


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
            fast, reference = weight.clone(), weight.clone()
            project_topk_(fast, k, minimum, row_dim)
            project_topk_reference_(reference, k, minimum, row_dim)
            assert torch.equal(fast, reference), (k, minimum)


def test_threads_change_nothing():
    weight = torch.randn(700, 1000, generator=torch.Generator().manual_seed(0))  # three pieces
    expected = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        for row_dim in (0, 1):
            for k in (5000, 200_000):
                copy = weight.clone()
                project_topk_(copy, k, 4, row_dim)
                expected.append(copy)
    for one, three in zip(expected[:4], expected[4:], strict=True):
        assert torch.equal(one, three)
