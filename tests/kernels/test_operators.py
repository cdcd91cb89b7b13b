"""AbsTopK as an operator of torch: what compiled code calls."""

import pytest
import torch

from hf_circuit_sparsity.kernels.cpu import without_kernels
from hf_circuit_sparsity.kernels.operators import abs_topk as operator
from hf_circuit_sparsity.modeling.functional import abs_topk, abs_topk_reference


def inputs(dtype=torch.float32):
    x = torch.randn(4, 5, 30, generator=torch.Generator().manual_seed(0))
    x[0, 0] = x[0, 0].round()
    x[1] = 0
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_it_keeps_what_is_defined_and_says_which(dtype):
    x = inputs(dtype)
    for layout in (x, x.transpose(0, 2), x[:, 2], x[:0]):
        kept, mask = operator(layout, 3)
        assert torch.equal(kept, abs_topk_reference(layout, 3))
        assert (mask.sum(-1) == 3).all() and not kept[~mask].any()
        with without_kernels():
            assert all(map(torch.equal, operator(layout, 3), (kept, mask)))


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_finds_nothing_wrong_with_it(dtype, requires_grad):
    x = inputs(dtype).transpose(0, 1).requires_grad_(requires_grad)
    torch.library.opcheck(operator, (x, 7))


def test_compiled_code_calls_it_once_for_each_use():
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda x: abs_topk(abs_topk(x, 9), 4), fullgraph=True, backend=backend)
    x = inputs().requires_grad_()
    expected = torch.autograd.grad(abs_topk(abs_topk(x, 9), 4).square().sum(), x)
    assert torch.equal(compiled(x), abs_topk_reference(x, 4))
    assert torch.equal(torch.autograd.grad(compiled(x).square().sum(), x)[0], expected[0])
    called = [node.target for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert called.count(torch.ops.hf_circuit_sparsity.abs_topk.default) == 2


TRANSFORMED = {
    "vmap": lambda x: torch.func.vmap(lambda row: abs_topk(row, 5))(x),
    "grad": lambda x: torch.func.grad(lambda row: abs_topk(row, 5).square().sum())(x),
    "jvp": lambda x: torch.func.jvp(lambda row: abs_topk(row, 5), (x,), (x * 2,))[1],
    "jacrev": lambda x: torch.func.jacrev(lambda row: abs_topk(row, 5))(x[0, 0]),
}


@pytest.mark.parametrize("transformed", TRANSFORMED.values(), ids=TRANSFORMED)
def test_transforms_of_functions_stay_right_when_compiled(transformed):
    x = inputs()
    compiled = torch.compile(transformed, backend="aot_eager")
    torch.testing.assert_close(compiled(x), transformed(x))
