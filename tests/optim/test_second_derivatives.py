"""Second derivatives through what is computed by kernels or on nonzeros: right, or refused."""

import copy
from contextlib import nullcontext

import pytest
import torch

from hf_circuit_sparsity import PartialGradients, RCDSparseOptimizer, sparse_param_groups
from hf_circuit_sparsity.kernels.cpu import without_kernels
from hf_circuit_sparsity.modeling.sparse_layers import to_sparse
from hf_circuit_sparsity.optim import sparse_compute
from hf_circuit_sparsity.optim.sparse_compute import on_nonzeros
from tests.conftest import random_model, sparsify

TOKENS = torch.arange(24).reshape(2, 12)


def product_with_hessian(model):
    """By parameter, of the Hessian and a vector that has the same numbers in every layout."""
    parameters = dict(model.named_parameters())
    loss = model(TOKENS, labels=TOKENS, use_cache=False).loss
    gradients = torch.autograd.grad(loss, parameters.values(), create_graph=True)
    along = sum((g * p.detach()).sum() for g, p in zip(gradients, parameters.values(), strict=True))
    return dict(zip(parameters, torch.autograd.grad(along, parameters.values()), strict=True))


@pytest.mark.parametrize("layers", ["dense", "sparse", "on nonzeros"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_of_a_model_are_those_of_plain_torch(
    attention, layers, tiny_config, either_path, monkeypatch
):
    monkeypatch.setattr(sparse_compute, "_MIN_WORK", 1)
    monkeypatch.setattr(sparse_compute, "_MIN_WORK_WITHOUT_KERNELS", 1)
    tiny_config.n_head, tiny_config.d_head = 2, 16  # for which there is a kernel
    model = sparsify(random_model(tiny_config), 0.05)
    plain = copy.deepcopy(model)
    plain.set_attn_implementation("eager")
    with without_kernels():
        expected = product_with_hessian(plain)
    model.set_attn_implementation(attention)
    if layers == "sparse":
        to_sparse(model)
    if attention == "sdpa" and either_path != "kernels":  # torch's own kernel has no second ones
        with pytest.raises(RuntimeError, match="not implemented"):
            product_with_hessian(model)
        return
    with on_nonzeros(model) if layers == "on nonzeros" else nullcontext():
        got = product_with_hessian(model)
    for name, value in expected.items():
        if name not in got:  # held by its nonzeros
            layer = model.get_submodule(name.removesuffix(".weight"))
            value, name = value[plain.get_parameter(name) != 0], f"{name[:-7]}.values"
            assert len(layer.values) == len(value)
        torch.testing.assert_close(got[name], value, rtol=1e-3, atol=1e-3, msg=name)


def test_of_partial_gradients_are_refused(tiny_model):
    optimizer = RCDSparseOptimizer(sparse_param_groups(tiny_model))
    with PartialGradients(tiny_model, optimizer):
        loss = tiny_model(TOKENS, labels=TOKENS).loss
        with pytest.raises(RuntimeError, match="create_graph"):
            torch.autograd.grad(loss, tiny_model.transformer.ln_f.weight, create_graph=True)
