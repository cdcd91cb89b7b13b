import pytest
import torch

from hf_circuit_sparsity.modeling.functional import abs_topk, abs_topk_reference

pytestmark = pytest.mark.usefixtures("either_path")


def hard_rows():
    """Rows that make a search for the threshold go wrong in every way it can."""
    x = torch.randn(40, 1500, generator=GENERATOR)
    x[3] *= 1e6  # unlike the row before
    x[4] *= 1e-6
    x[5] = 0
    x[6] = 2.5
    x[7, :700] = torch.inf
    x[8] = x[8].round()
    x[9] = x[9].relu() * (torch.rand(1500, generator=GENERATOR) < 0.2)
    x[10] = torch.logspace(-37, 38, 1500)
    x[11] = torch.where(torch.arange(1500) % 2 == 0, 1e-40, -1e-40)  # not normalized
    x[12] = torch.arange(1500.0) * 2**-149
    x[13, ::3] = -0.0
    return x


GENERATOR = torch.Generator().manual_seed(0)
ROWS = {
    "plain": torch.randn(5, 7, 64, generator=GENERATOR),
    "many ties": torch.randint(-3, 4, (40, 33), generator=GENERATOR).float(),
    "mostly zeros": torch.randn(40, 65, generator=GENERATOR).relu()
    * (torch.rand(40, 65, generator=GENERATOR) < 0.1),
    "signed zeros": torch.tensor([[0.0, -0.0, 0.0, -0.0], [-1.0, 1.0, -1.0, 0.5]]),
    "wide": torch.randn(3, 5000, generator=GENERATOR),
    "many": torch.randn(300, 2050, generator=GENERATOR),
    "many, with ties": torch.randint(-3, 4, (300, 1100), generator=GENERATOR).float(),
    "one row": torch.randn(16, generator=GENERATOR),
    "rows that lie apart": torch.randn(9, 3, 300, generator=GENERATOR)[:, 1, 20:250],
    "no rows": torch.randn(0, 8, generator=GENERATOR),
    "infinities": torch.tensor([[1.0, -torch.inf, 2.0, torch.inf]]),
    "hard": hard_rows(),
}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("x", ROWS.values(), ids=ROWS)
def test_abs_topk_and_its_gradient_are_those_of_the_reference(x, dtype, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    x = x.to(dtype)
    width, up = x.shape[-1], torch.randn(x.shape, generator=GENERATOR).to(dtype)
    for k in sorted({0, 1, 2, width // 4, width // 2, width - 1, width}):
        ours, plain = x.clone().requires_grad_(), x.clone().requires_grad_()
        expected = abs_topk_reference(plain, k)
        assert torch.equal(abs_topk(x, k), expected), k
        kept = abs_topk(ours, k)
        assert torch.equal(kept, expected), k
        if kept.requires_grad:
            kept.backward(up)
            expected.backward(up)
            assert torch.equal(ours.grad, plain.grad), k


def test_second_derivatives():
    smooth = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda t: abs_topk(t, 3) ** 3, smooth)


def test_under_torch_func():
    x = ROWS["plain"]

    def loss(x):
        return (abs_topk(x, 8) ** 3).sum()

    torch.testing.assert_close(torch.func.grad(loss)(x), 3 * abs_topk(x, 8) ** 2)
    assert torch.equal(torch.func.vmap(lambda x: abs_topk(x, 8))(x), abs_topk(x, 8))
