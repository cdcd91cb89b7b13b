import pytest
import torch
from torch import nn

from hf_circuit_sparsity.optim.rcd.forward_mode import (
    add_forward_gradients,
    coordinate_derivatives,
    directional_derivative,
)
from hf_circuit_sparsity.optim.rcd.optimizer import RCDSparseOptimizer
from tests.conftest import random_model

TOKENS = torch.randint(0, 61, (2, 12), generator=torch.Generator().manual_seed(0))


def loss_of(model):
    return model(input_ids=TOKENS, labels=TOKENS).loss


@pytest.fixture(params=["circuitgpt", "gpt2", "llama"])
def model(request, tiny_config, make_gpt2, make_llama):
    make = {
        "circuitgpt": lambda: random_model(tiny_config),
        "gpt2": make_gpt2,
        "llama": make_llama,
    }
    return make[request.param]().eval()


def test_derivatives_are_those_of_the_backward_pass(model):
    before = model.config._attn_implementation
    loss = loss_of(model)
    loss.backward()
    g = torch.Generator().manual_seed(0)
    direction, expected, chosen = {}, 0.0, {}
    for name, p in model.named_parameters():
        direction[name] = torch.randn(p.shape, generator=g)
        expected += (direction[name] * p.grad).sum()
        if p.ndim > 1 and len(chosen) < 4:
            chosen[name] = p.grad.abs().flatten().topk(2).indices
    found_loss, found = directional_derivative(model, loss_of, direction)
    torch.testing.assert_close(found_loss, loss.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    for name, derivatives in coordinate_derivatives(model, loss_of, chosen).items():
        full = model.get_parameter(name).grad.flatten()[chosen[name]]
        torch.testing.assert_close(derivatives, full, rtol=1e-3, atol=1e-5)
    assert model.config._attn_implementation == before == "sdpa"


def test_nothing_is_stored_for_a_backward_pass(model):
    stored = []

    def pack(tensor):
        stored.append(tensor.numel())
        return tensor

    name = next(name for name, p in model.named_parameters() if p.ndim > 1)
    direction = {name: torch.ones_like(model.get_parameter(name))}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        directional_derivative(model, loss_of, direction)
        assert not stored
        loss_of(model)
    assert sum(stored) > 10_000


def test_the_optimizer_takes_the_step_it_takes_with_a_backward_pass():
    def loss(model):
        return model(torch.linspace(-1, 1, 24).view(4, 6)).square().mean()

    weights = []
    for forward_mode in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        with torch.no_grad():
            model[0].weight[1:] = 0.0
        optimizer = RCDSparseOptimizer(model.parameters(), lr=0.1, block_fraction=0.25, seed=1)
        for _ in range(3):
            if forward_mode:
                add_forward_gradients(model, optimizer, loss)
                assert all(p.grad is None for p in model.parameters())
            else:
                optimizer.zero_grad()
                loss(model).backward()
            optimizer.step()
        weights.append([p.detach() for p in model.parameters()])
    for p, q in zip(*weights, strict=True):
        torch.testing.assert_close(p, q)


def test_bad_directions_are_named():
    model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match=r"'wait' has shape \(2, 3\), the model has no such"):
        directional_derivative(model, loss_of, {"wait": torch.zeros(2, 3)})
    with pytest.raises(ValueError, match=r"'weight' has shape \(3,\)"):
        directional_derivative(model, loss_of, {"weight": torch.zeros(3)})
