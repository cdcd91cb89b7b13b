"""The nonzeros of a matrix, against the matrix."""

from contextlib import nullcontext

import pytest
import torch
from torch.nn import functional as F

from hf_circuit_sparsity.kernels.cpu import load_kernels, without_kernels
from hf_circuit_sparsity.modeling.csr import CSR, linear_reference, sampled_reference

GENERATOR = torch.Generator().manual_seed(0)
DENSITIES = [0.0, 0.05, 1.0]


@pytest.fixture(params=["kernels", "torch", "no MKL"], autouse=True)
def path(request, monkeypatch):
    if request.param == "no MKL":
        monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    if request.param == "kernels" and load_kernels() is None:
        pytest.skip("no C compiler was found, or it is switched off")
    with nullcontext() if request.param == "kernels" else without_kernels():
        yield


def random_sparse(rows: int, width: int, density: float) -> torch.Tensor:
    weight = torch.randn(rows, width, generator=GENERATOR)
    weight *= torch.rand(rows, width, generator=GENERATOR) < density
    weight[rows // 2] = 0.0
    return weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("shape", [(33, 20), (1, 1), (4, 500)])
def test_dense_and_back(shape, density, dtype):
    weight = random_sparse(*shape, density).to(dtype)
    csr = CSR.from_dense(weight)
    assert csr.row_starts.dtype == csr.columns.dtype == torch.int32 and csr.shape == shape
    assert torch.equal(csr.to_dense(), weight)
    assert torch.equal(csr.positions, weight.flatten().nonzero().flatten())
    assert len(csr) == len(csr.values) == torch.count_nonzero(weight)
    again = CSR.from_positions(csr.positions, weight.shape, csr.values)
    assert torch.equal(again.row_starts, csr.row_starts)
    assert torch.equal(again.columns, csr.columns)
    transposed = csr.transposed()
    assert transposed.shape == shape[::-1] and torch.equal(transposed.to_dense(), weight.T)
    assert torch.equal(csr.with_values(2 * csr.values).transposed().to_dense(), 2 * weight.T)


@pytest.mark.parametrize("tokens", [0, 1, 3, 16, 77, 300])
@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize(("rows", "width"), [(33, 20), (70, 33), (18, 40)])
def test_products(rows, width, tokens, density, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1 + rows % 2)
    weight = random_sparse(rows, width, density)
    csr = CSR.from_dense(weight)
    x, up = (torch.randn(tokens, n, generator=GENERATOR) for n in (width, rows))
    bias = torch.randn(rows, generator=GENERATOR)
    for b in (None, bias):
        y = csr.linear(x, b)
        torch.testing.assert_close(y, F.linear(x, weight, b))
        torch.testing.assert_close(linear_reference(csr, x, b), y)
        assert y.is_contiguous()
    torch.testing.assert_close(csr.transposed().linear(up), up @ weight)
    expected = (up.T @ x)[weight != 0]
    for sampled in (csr.sampled(up, x), sampled_reference(csr, up, x)):
        torch.testing.assert_close(sampled, expected, atol=1e-4, rtol=1e-4)
    half = csr.linear(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), x @ weight.T, atol=0.1, rtol=0.05)
    assert csr.sampled(up.bfloat16(), x.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("rows", [5, 40])
def test_linear_of_any_number_of_tokens(rows):
    # The kernel takes 32 tokens at a time, then 16, then what is left.
    g = torch.Generator().manual_seed(1)
    weight = torch.randn(rows, 50, generator=g) * (torch.rand(rows, 50, generator=g) < 0.2)
    weight[rows // 2] = 0
    csr, bias = CSR.from_dense(weight), torch.randn(rows, generator=g)
    for tokens in (0, 1, 3, 4, 15, 16, 17, 31, 32, 33, 47, 48, 70):
        x = torch.randn(tokens, 50, generator=g)
        torch.testing.assert_close(csr.linear(x, bias), F.linear(x, weight, bias))
