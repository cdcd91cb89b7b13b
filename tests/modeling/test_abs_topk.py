import pytest
import torch

from hf_circuit_sparsity.modeling.functional import abs_topk, abs_topk_reference

pytestmark = pytest.mark.usefixtures("either_path")

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
    "no rows": torch.randn(0, 8, generator=GENERATOR),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("x", ROWS.values(), ids=ROWS)
def test_abs_topk_equals_its_reference(x, dtype):
    x = x.to(dtype)
    width = x.shape[-1]
    for k in sorted({0, 1, width // 4, width // 2, width - 1, width}):
        kept, expected = abs_topk(x, k), abs_topk_reference(x, k)
        assert torch.equal(kept, expected), k
        assert ((kept != 0).sum(-1) <= k).all()


def test_gradient_reaches_the_kept_entries_only():
    x = ROWS["many ties"].clone().requires_grad_()
    upstream = torch.randn(x.shape, generator=GENERATOR)
    reference = x.detach().clone().requires_grad_()
    (abs_topk(x, 8) * upstream).sum().backward()
    (abs_topk_reference(reference, 8) * upstream).sum().backward()
    torch.testing.assert_close(x.grad, reference.grad)
    assert ((x.grad != 0).sum(-1) <= 8).all()
    smooth = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda t: abs_topk(t, 3) ** 3, smooth)


def test_under_torch_func():
    x = ROWS["plain"]

    def loss(x):
        return (abs_topk(x, 8) ** 3).sum()

    torch.testing.assert_close(torch.func.grad(loss)(x), 3 * abs_topk(x, 8) ** 2)
    assert torch.equal(torch.func.vmap(lambda x: abs_topk(x, 8))(x), abs_topk(x, 8))


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_infinities_are_the_largest(k, requires_grad):
    x = torch.tensor([[1.0, -torch.inf, 2.0, torch.inf]], requires_grad=requires_grad)
    assert torch.equal(abs_topk(x, k), abs_topk_reference(x, k))
