"""The Triton kernels give what plain torch gives; `test_triton.py` runs this file."""

import sys

import pytest
import torch

from hf_circuit_sparsity.kernels import cpu, triton_projection
from hf_circuit_sparsity.kernels.gpu import TritonKernels
from hf_circuit_sparsity.modeling import functional
from hf_circuit_sparsity.modeling.functional import abs_topk, abs_topk_reference
from hf_circuit_sparsity.optim import projection
from hf_circuit_sparsity.optim.projection import project_topk_, project_topk_reference_

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def kernels():
    """With small blocks, so that small matrices have many."""
    return TritonKernels(per_thread=4, block=128, warps=4)


@pytest.fixture
def through_kernels(kernels, monkeypatch):
    """The public functions find these kernels, as they do for a CUDA tensor."""
    for module in (functional, projection):
        monkeypatch.setattr(module, "selection_kernels", lambda x: kernels)
    monkeypatch.setattr(
        projection, "project_cpu_",
        lambda *case: projection._project_together_(*([part] for part in case)),
    )  # fmt: skip


def rows_of_every_kind(width, dtype):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(9, width, generator=generator)
    x[1] = 0
    x[2] = x[2].round()
    x[3] = -2.5
    x[4, ::3] = torch.inf
    x[5] = x[5].relu()
    x[6, ::2] = -0.0
    x[7] = torch.arange(width) * 2**-149
    return x.to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [2, 16, 31, 130])
def test_abs_topk_and_its_mask(kernels, width, dtype):
    x = rows_of_every_kind(width, dtype)
    for k in {1, width // 4 or 1, width - 1}:
        kept, mask = kernels.abs_topk(x, k, want_mask=True)
        first = x.abs().sort(dim=-1, descending=True, stable=True).indices[:, :k]
        assert torch.equal(mask, torch.zeros_like(mask).scatter(-1, first, True))
        assert torch.equal(kept, abs_topk_reference(x, k))
        assert torch.equal(kernels.abs_topk(x, k, want_mask=False)[0], kept)


def test_abs_topk_of_other_layouts_and_nan(kernels):
    x = torch.randn(3, 40, 2, 30, device=DEVICE)
    for part in (x[0, :, 1, 3:24], x[1].transpose(0, 2), x[:, 3], x[0, 0, 0]):
        kept, _ = kernels.abs_topk(part, 2, want_mask=False)
        assert kept.shape == part.shape and torch.equal(kept, abs_topk_reference(part, 2))
    part = x[0, 0].clone()
    part[1, 7] = torch.nan
    kept, mask = kernels.abs_topk(part, 4, want_mask=True)
    assert kept[1, 7].isnan() and mask.sum() == 8


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_reaches_what_is_kept(through_kernels, dtype):
    x, up = (rows_of_every_kind(30, dtype).nan_to_num(posinf=9) for _ in range(2))
    up[0, :3] = torch.inf  # where nothing is kept the gradient is 0 all the same
    up[7] = up[0]  # as the plain path's atomic additions on a GPU lose what is not normalized
    up[7, :3] = 1.5
    ours, plain = x.clone().requires_grad_(), x.clone().requires_grad_()
    abs_topk(ours, 7).backward(up)
    abs_topk_reference(plain, 7).backward(up)
    assert torch.equal(ours.grad, plain.grad)
    for k in (0, 30):
        assert torch.equal(abs_topk(x, k), abs_topk_reference(x, k))


def matrices(rows, width, dtype):
    g = torch.Generator().manual_seed(0)
    normal = torch.randn(rows, width, generator=g)
    found = {
        "normal": normal,
        "ties": torch.randint(-3, 4, (rows, width), generator=g).float(),
        "constant": torch.full((rows, width), -0.5),
        "zeros": torch.zeros(rows, width),
        "mostly zeros": normal * (torch.rand(rows, width, generator=g) < 0.05),
        "heavy tails, dead row": normal**5 * (torch.arange(rows) != 3)[:, None],
        "denormal": torch.arange(rows * width).view(rows, width) * 2.0**-149,
    }
    return [(name, matrix.to(DEVICE, dtype)) for name, matrix in found.items()]


def check_projection(kernels, matrix, k, min_nonzeros=0, row_dim=0):
    expected, got = matrix.clone(), matrix.clone()
    project_topk_reference_(expected, k, min_nonzeros, row_dim)
    kernels.project_([got], [k], [min_nonzeros], [row_dim])
    assert torch.equal(got, expected), (k, min_nonzeros, row_dim)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (23, 17)])
def test_projection(kernels, rows, width, dtype):
    for _, matrix in matrices(rows, width, dtype):
        for k in {0, rows * width // 9, rows * width}:
            check_projection(kernels, matrix, k)
    for _, matrix in matrices(rows, width, dtype):
        check_projection(kernels, matrix, rows * width // 3, min_nonzeros=4)
        check_projection(kernels, matrix, rows * width // 9, min_nonzeros=2, row_dim=1)


@pytest.fixture
def large_blocks(kernels, monkeypatch):
    """For matrices that are sampled, which the interpreter takes long for."""
    monkeypatch.setattr(kernels, "block", 4096)
    return kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_projection_by_a_sample(large_blocks, dtype):
    for name, matrix in matrices(129, 130, dtype):
        if name in ("normal", "ties"):
            for k, min_nonzeros in ((250, 0), (9000, 0), (1500, 3)):
                check_projection(large_blocks, matrix, k, min_nonzeros)


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_a_sample_that_misleads_costs_time_only(large_blocks, factor):
    matrix = torch.rand(160, 128, generator=torch.Generator().manual_seed(2)) + 1.0
    matrix.view(-1)[::3] *= factor  # what is sampled, being every third
    for k in (100, 10000, 16000):
        check_projection(large_blocks, matrix.to(DEVICE), k)


def test_projection_of_other_shapes(through_kernels):
    for shape in ((200,), (2, 5, 6, 7)):
        got = torch.randn(shape, device=DEVICE)
        expected = got.clone()
        minimum = 3 if len(shape) > 1 else 0
        project_topk_(got, 20, minimum)
        project_topk_reference_(expected, 20, minimum)
        assert torch.equal(got, expected)
    storage = torch.randn(20, 30, device=DEVICE)
    expected = storage.T.clone()
    project_topk_(storage.T, 50, min_nonzeros=2)
    project_topk_reference_(expected, 50, min_nonzeros=2)
    assert torch.equal(storage, expected.T)


@pytest.mark.parametrize("most_entries", [2**26, 1000])
def test_matrices_of_every_kind_together(kernels, monkeypatch, most_entries):
    monkeypatch.setattr(triton_projection, "MOST_ENTRIES", most_entries)
    cases = [  # matrix, budget, row minimum, row dimension
        (torch.randn(12, 70), 90, 4, 0),
        (torch.randn(70, 12), 120, 3, 1),
        (torch.randn(5, 200), 60, 20, 0),  # more than the budget, and not one after the other
        (torch.randn(33, 1), 5, 0, 0),
        (torch.randn(10, 15, dtype=torch.bfloat16), 30, 2, 0),
        (torch.randint(-2, 3, (9, 65)).float(), 130, 1, 0),
        (torch.randn(3, 3).half(), 4, 1, 1),
    ]
    got = [matrix.to(DEVICE) for matrix, *_ in cases]
    expected = [matrix.clone() for matrix in got]
    settings = list(zip(*(case[1:] for case in cases), strict=True))
    for _ in range(2):  # with other budgets and the same tables
        for matrix, *rest in zip(expected, *settings, strict=True):
            project_topk_reference_(matrix, *rest)
        kernels.project_(got, *settings)
        for ours, plain, case in zip(got, expected, cases, strict=True):
            assert torch.equal(ours, plain), case[1:]
        settings[0] = [budget // 2 for budget in settings[0]]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_is_left_alone_and_reported_later(through_kernels, bad, dtype):
    matrix = torch.randn(9, 30).to(DEVICE, dtype)
    matrix[7, 5] = bad
    before = matrix.clone()
    project_topk_(matrix, 20, min_nonzeros=1)
    assert torch.equal(matrix.nan_to_num(7, 8, 9), before.nan_to_num(7, 8, 9))
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    other = torch.ones(4, 4, device=DEVICE)
    with pytest.raises(ValueError, match=r"\(9, 30\)"):
        project_topk_(other, 3)
    project_topk_(other, 3)
    assert other.count_nonzero() == 3


def test_without_triton_the_plain_path_is_taken_and_said_once(monkeypatch):
    monkeypatch.setitem(sys.modules, f"{cpu.__package__}.gpu", None)
    cpu.load_triton_kernels.cache_clear()
    try:
        assert cpu.load_triton_kernels() is None
    finally:
        cpu.load_triton_kernels.cache_clear()
