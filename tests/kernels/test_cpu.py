"""Every compiled kernel gives what plain torch gives."""

import os
import signal
import threading

import pytest
import torch

from hf_circuit_sparsity.kernels import calling
from hf_circuit_sparsity.kernels.cpu import compiled_kernels, load_kernels

pytestmark = pytest.mark.skipif(load_kernels() is None, reason="no C compiler, or switched off")


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"], autouse=True)
def thread_count(request, monkeypatch):
    monkeypatch.setattr(calling.torch, "get_num_threads", lambda: request.param)


@pytest.fixture
def kernels():
    return load_kernels()


def sparse(rows, width, density, seed=0):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rows, width, generator=generator)
    return a * (torch.rand(rows, width, generator=generator) < density)


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
        assert nonzeros.count == torch.count_nonzero(a)
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
        assert kernels.list_nonzeros(torch.ones(20, 30), 1.0, transpose).count == 600
        full = kernels.list_nonzeros(torch.ones(40, 2050), 1.0, transpose)  # in several regions
        assert full.count == 40 * 2050
        if not transpose:
            torch.testing.assert_close(
                kernels.product(full, torch.ones(2050, 3)), torch.full((40, 3), 2050.0)
            )
    assert len(kernels.nonzeros(torch.ones(20, 30), 600)[2]) == 600


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


def test_pieces_are_worked_on_by_several_threads_and_errors_come_back(monkeypatch):
    monkeypatch.setattr(calling.torch, "get_num_threads", lambda: 3)
    together, seen = threading.Barrier(3, timeout=20), set()

    def meet(i):
        together.wait()  # none comes through alone
        seen.add(threading.get_native_id())
        # What is shared within would wait for threads that are all busy.
        return sum(calling.map_pieces(abs, [-i, i, -i]))

    assert calling.map_pieces(meet, range(3)) == [0, 3, 6] and len(seen) == 3
    with pytest.raises(ZeroDivisionError):
        calling.map_pieces(lambda i: 1 // i, [2, 1, 0])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*multi-threaded")
def test_a_forked_process_makes_its_own_threads(kernels, monkeypatch):
    monkeypatch.setattr(calling.torch, "get_num_threads", lambda: 2)
    x = torch.arange(2.0 * calling.PIECE).view(-1, 64)
    assert calling.map_pieces(abs, [-1, -2, -3]) == [1, 2, 3]
    expected = kernels.abs_topk(x, 5, want_mask=False)[0]
    pid = os.fork()
    if pid == 0:
        signal.alarm(20)  # a pool without its threads would wait for ever
        same = torch.equal(kernels.abs_topk(x, 5, want_mask=False)[0], expected)
        os._exit(0 if same and calling.map_pieces(abs, [-4, -5]) == [4, 5] else 1)
    assert os.waitpid(pid, 0)[1] == 0
