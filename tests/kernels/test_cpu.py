"""Every compiled kernel gives what plain torch gives."""

import os
import signal

import pytest
import torch

from hf_circuit_sparsity.kernels import threads
from hf_circuit_sparsity.kernels.cpu import compiled_kernels, load_kernels
from hf_circuit_sparsity.modeling.csr import CSR
from hf_circuit_sparsity.modeling.functional import abs_topk_reference

pytestmark = pytest.mark.skipif(load_kernels() is None, reason="no C compiler, or switched off")


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"], autouse=True)
def thread_count(request, monkeypatch):
    monkeypatch.setattr(threads.torch, "get_num_threads", lambda: request.param)


@pytest.fixture
def kernels():
    return load_kernels()


def sparse(rows, width, density, seed=0):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rows, width, generator=generator)
    return a * (torch.rand(rows, width, generator=generator) < density)


def structured_rows():
    """Rows that make the search for the threshold go wrong in every way it can."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(40, 1500, generator=generator)
    x[3] *= 1e6  # unlike the row before
    x[4] *= 1e-6
    x[5] = 0
    x[6] = 2.5
    x[7, :700] = torch.inf
    x[8] = x[8].round()
    x[9] = x[9].relu() * (torch.rand(1500, generator=generator) < 0.2)
    x[10] = torch.logspace(-37, 38, 1500)
    x[11] = torch.where(torch.arange(1500) % 2 == 0, 1e-40, -1e-40)  # not normalized
    x[12] = torch.arange(1500.0) * 2**-149
    x[13, ::3] = -0.0
    return x


@pytest.mark.parametrize("k", [1, 2, 375, 700, 1499])
def test_abs_topk_and_its_mask(kernels, k):
    x = structured_rows()
    kept, mask = kernels.abs_topk(x, k, want_mask=True)
    assert torch.equal(kept, abs_topk_reference(x, k))
    first_of_equals = x.abs().sort(dim=-1, descending=True, stable=True).indices[..., :k]
    assert torch.equal(mask, torch.zeros_like(x, dtype=torch.bool).scatter(-1, first_of_equals, 1))
    assert torch.equal(kernels.abs_topk(x, k, want_mask=False)[0], kept)
    assert torch.equal(kernels.masked(x, mask), torch.where(mask, x, 0.0))


def test_abs_topk_of_rows_that_lie_apart(kernels):
    part = torch.randn(9, 3, 300)[:, 1, 20:250]
    assert torch.equal(kernels.abs_topk(part, 50, False)[0], abs_topk_reference(part, 50))


def test_nan_counts_as_the_largest(kernels):
    x = torch.randn(3, 400)
    x[1, 7] = torch.nan
    kept, mask = kernels.abs_topk(x, 4, want_mask=True)
    assert kept[1, 7].isnan() and mask.sum() == 12


@pytest.mark.parametrize(
    ("rows", "width", "n"), [(1, 1, 1), (5, 17, 130), (40, 1024, 128), (33, 2100, 300), (0, 5, 3)]
)
@pytest.mark.parametrize("density", [0.0, 0.2, 0.39])
def test_product_with_listed_nonzeros(kernels, rows, width, n, density):
    a, b = sparse(rows, width, density), torch.randn(width, n)
    if rows * width == 1:
        a.zero_()
    expected = (a.double() @ b.double()).float()
    listed = kernels.list_nonzeros(a, 0.6)
    of_transpose = kernels.list_nonzeros(a.t().contiguous(), 0.6, transpose=True)
    for nonzeros in (listed, of_transpose):
        assert len(nonzeros.values) == torch.count_nonzero(a)
        assert (nonzeros.rows, nonzeros.width) == (rows, width)
        for out in (
            kernels.product(nonzeros, b),
            kernels.product(nonzeros, b.t().contiguous(), transpose=True),
        ):
            torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)


def test_too_many_nonzeros_are_not_listed(kernels):
    assert kernels.list_nonzeros(torch.ones(20, 30), 0.4) is None
    hidden = torch.zeros(64, 1030)  # where the look at a few rows does not see them
    hidden[[i for i in range(64) if i % 8]] = 1
    assert kernels.list_nonzeros(hidden, 0.4) is None
    assert kernels.list_nonzeros(hidden, 0.4, transpose=True) is None
    assert kernels.nonzeros(hidden, int(0.4 * hidden.numel())) is None
    assert kernels.nonzeros(torch.ones(3, 50), 147) is None


def test_lists_as_many_as_there_is_room_for(kernels):
    for transpose in (False, True):
        assert len(kernels.list_nonzeros(torch.ones(20, 30), 1.0, transpose).values) == 600
    assert len(kernels.nonzeros(torch.ones(20, 30), 600)[2]) == 600


@pytest.mark.parametrize("tokens", [0, 1, 3, 5, 16, 77])
@pytest.mark.parametrize(("rows", "width"), [(18, 40), (70, 33)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_sparse_linear_and_the_gradient_at_its_nonzeros(kernels, tokens, rows, width, with_bias):
    weight = sparse(rows, width, 0.1)
    csr = CSR.from_positions(weight.flatten().nonzero().flatten(), weight.shape)
    row_starts, columns, values = csr.row_starts, csr.columns, weight[weight != 0]
    x, grad = torch.randn(tokens, width), torch.randn(tokens, rows)
    bias = torch.randn(rows) if with_bias else None
    y = kernels.sparse_linear(x, row_starts, columns, values, rows, bias)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, weight, bias))
    at = kernels.gradient_at(row_starts, columns, grad, x)
    torch.testing.assert_close(at, (grad.t() @ x)[weight != 0], atol=1e-4, rtol=1e-4)


def test_kernels_are_for_plain_float32_tensors_on_the_cpu():
    x = torch.randn(3)
    assert compiled_kernels(x, torch.nn.Parameter(x)) is not None
    assert compiled_kernels(x, x.double()) is None
    assert compiled_kernels(x.to("meta")) is None
    with torch._subclasses.FakeTensorMode():
        assert compiled_kernels(torch.empty(3)) is None
    seen = []
    torch.func.grad(lambda t: seen.append(compiled_kernels(t)) or t.sum())(x)
    assert seen == [None]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*multi-threaded")
def test_a_forked_process_makes_its_own_threads(monkeypatch):
    monkeypatch.setattr(threads.torch, "get_num_threads", lambda: 2)
    assert threads.map_pieces(abs, [-1, -2, -3]) == [1, 2, 3]
    pid = os.fork()
    if pid == 0:
        signal.alarm(20)  # a pool without its threads would wait for ever
        os._exit(0 if threads.map_pieces(abs, [-4, -5]) == [4, 5] else 1)
    assert os.waitpid(pid, 0)[1] == 0
