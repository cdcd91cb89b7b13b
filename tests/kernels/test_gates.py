"""Gates by one pass give what torch's own operations give, and so do their gradients."""

import pytest
import torch

from hf_circuit_sparsity.circuits.gating import gate_hook
from hf_circuit_sparsity.kernels.cpu import load_kernels, without_kernels

pytestmark = pytest.mark.skipif(load_kernels() is None, reason="no compiled kernels here")


def inputs(k: int, rows: int, tokens: int, width: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(k * rows, tokens, width, generator=generator)
    x *= torch.rand(x.shape, generator=generator) < 0.25
    gate = torch.rand(k, width, generator=generator)
    gate[:, ::3], gate[:, 1::3] = 1, 0  # as they are while masks are learned
    return [x, gate, torch.randn(width, generator=generator)]


def gated(x: torch.Tensor, gate: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    return gate_hook("site", {"site": gate}, mean)(torch.nn.Identity(), (), x)


@pytest.mark.parametrize("k, rows, tokens", [(1, 1, 1), (1, 9, 40), (3, 4, 70)])
@pytest.mark.parametrize("width", [1, 16, 64, 131, 512])
def test_values_and_gradients_are_those_of_torch(k, rows, tokens, width):
    x, gate, mean = inputs(k, rows, tokens, width)
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    found = []
    for fast in (True, False):
        leaves = [x.clone().requires_grad_(), gate.clone().requires_grad_()]
        if fast:
            out = gated(*leaves, mean)
            assert "Gates" in str(out.grad_fn.next_functions) + str(out.grad_fn)
        else:
            with without_kernels():
                out = gated(*leaves, mean)
        out.backward(grad)
        found.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for fast, plain in zip(*found, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-4)
    kept = gate[:, None, None].expand(k, rows, tokens, width).flatten(0, 1) == 1
    assert found[0][0][kept].equal(x[kept])  # what is open is untouched, to the bit


def test_the_number_of_threads_changes_no_bit():
    x, gate, mean = inputs(2, 30, 40, 131)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            leaves = [x.clone().requires_grad_(), gate.clone().requires_grad_()]
            out = gated(*leaves, mean)
            out.square().sum().backward()
            found.append([out.detach(), *(leaf.grad for leaf in leaves)])
    finally:
        torch.set_num_threads(before)
    for parts in found[1:]:
        assert all(part.equal(first) for part, first in zip(parts, found[0], strict=True))


def test_second_derivatives_are_right():
    x, gate, mean = inputs(2, 2, 3, 20)
    found = []
    for fast in (True, False):
        leaf, g = x.clone().requires_grad_(), gate.clone().requires_grad_()
        if fast:
            out = gated(leaf, g, mean)
        else:
            with without_kernels():
                out = gated(leaf, g, mean)
        (first,) = torch.autograd.grad(out.pow(3).sum(), g, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), (leaf, g)))
    for fast, plain in zip(*found, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-4)


def test_views_and_what_is_learned_by_nobody():
    x, gate, mean = inputs(1, 6, 10, 32)
    turned = x.transpose(0, 1)
    assert not turned.is_contiguous()
    torch.testing.assert_close(gated(turned, gate, mean), gated(turned.contiguous(), gate, mean))
    assert not gated(x, gate, mean).requires_grad
    assert gated(x, gate > 0, mean).equal(torch.where(gate > 0, x, mean))
