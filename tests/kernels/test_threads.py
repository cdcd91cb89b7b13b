"""However many threads share the work, kernels give the same bits."""

import pytest
import torch

from hf_circuit_sparsity.kernels import calling
from hf_circuit_sparsity.kernels.cpu import load_kernels
from hf_circuit_sparsity.modeling.csr import CSR
from hf_circuit_sparsity.modeling.functional import abs_topk, sdpa_attention_with_sink
from hf_circuit_sparsity.optim.projection import project_topk_, project_topk_each_

from ..modeling.test_blocks import sparse_model, tokens

pytestmark = pytest.mark.skipif(load_kernels() is None, reason="no compiled kernels here")


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def selection() -> list[torch.Tensor]:
    x = randn(301, 700).requires_grad_()
    kept = abs_topk(x, 90)
    kept.backward(randn(301, 700, seed=1))
    return [kept.detach(), x.grad]


def projection() -> list[torch.Tensor]:
    one = [randn(600, 520, seed=i) for i in range(3)]
    project_topk_(one[0], 9_000, 3)
    project_topk_(one[1], 2_000, 0)
    several = [randn(64, 80, seed=i) for i in range(4)]
    project_topk_each_(several, [300] * 4, [2] * 4, [0, 1, 0, 1])
    return [*one, *several]


def attention() -> list[torch.Tensor]:
    parts = [randn(2, 5, 70, 32, seed=i).requires_grad_() for i in range(3)]
    sink = randn(5, seed=4).requires_grad_()
    out, _ = sdpa_attention_with_sink(torch.nn.Identity(), *parts, None, 0.2, 0.0, sink)
    out.backward(randn(*out.shape, seed=5))
    return [out.detach(), sink.grad, *(part.grad for part in parts)]


def products() -> list[torch.Tensor]:
    weight = randn(330, 410) * (randn(330, 410, seed=1) > 1.5)
    x, grad = randn(203, 410, seed=2), randn(203, 330, seed=3)
    csr = CSR.from_dense(weight)
    bias = randn(330, seed=4)
    return [
        csr.row_starts, csr.columns, csr.values, csr.linear(x, bias), csr.sampled(grad, x),
        csr.transposed().linear(grad),
    ]  # fmt: skip


def whole_model() -> list[torch.Tensor]:
    """Forward, backward, and text that is generated; of the blocks, since the unembedding is
    torch's dense product, which some processors split in other ways among eight threads."""
    model, ids = sparse_model(), tokens(2, 90)
    hidden = model.transformer(ids).last_hidden_state
    hidden.square().mean().backward()
    text = model.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=0)
    gradients = [p.grad for p in model.transformer.parameters()]
    assert None not in gradients
    return [text, hidden.detach(), *gradients]


@pytest.mark.parametrize("openmp", [True, False], ids=["torch's threads", "a pool"])
@pytest.mark.parametrize(
    "compute", [selection, projection, attention, products, whole_model], ids=lambda f: f.__name__
)
def test_the_same_bits_on_any_number_of_threads(compute, openmp, monkeypatch):
    if not openmp:
        monkeypatch.setattr(calling, "_openmp", lambda: None)
    elif calling._openmp() is None:
        pytest.skip("torch has no OpenMP here that can be asked")
    threads, results = torch.get_num_threads(), {}
    try:
        for n in (1, 2, 3, 8):
            torch.set_num_threads(n)
            results[n] = compute()
    finally:
        torch.set_num_threads(threads)
    for n, tensors in results.items():
        for one, other in zip(results[1], tensors, strict=True):
            assert torch.equal(one, other), n
