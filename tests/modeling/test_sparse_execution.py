"""Running on the nonzeros gives what the dense matrices give."""

import copy

import pytest
import torch

from hf_circuit_sparsity import CircuitGPTConfig, CircuitGPTForCausalLM
from hf_circuit_sparsity.circuits.edges import circuit_edges
from hf_circuit_sparsity.modeling.fingerprint import model_fingerprint
from hf_circuit_sparsity.modeling.sparse_layers import SparseLinear, sparse_layers
from tests.circuits.planted import PLANTED_EDGES, PLANTED_NODES, planted_model
from tests.conftest import random_model, sparsify

pytestmark = pytest.mark.usefixtures("either_path")

IDS = torch.arange(24).reshape(2, 12)
GENERATOR = torch.Generator().manual_seed(0)


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def sparse_model(request, tiny_config) -> CircuitGPTForCausalLM:
    config = CircuitGPTConfig(**{**tiny_config.to_dict(), "tied_unembed": request.param})
    return sparsify(random_model(config))


def test_model_equals_its_dense_self(sparse_model):
    dense = copy.deepcopy(sparse_model)
    names, fingerprint = list(dense.state_dict()), model_fingerprint(dense)
    assert sparse_model.to_sparse() is sparse_model
    assert len(sparse_layers(sparse_model)) == 11  # four per layer, wte, wpe, lm_head
    assert isinstance(sparse_model.lm_head, SparseLinear)

    a, b = dense(IDS, labels=IDS), sparse_model(IDS, labels=IDS)
    torch.testing.assert_close(b.logits, a.logits, atol=1e-5, rtol=0)
    a.loss.backward()
    b.loss.backward()
    for name, p in sparse_model.named_parameters():
        plain = dense.get_parameter(name.replace(".values", ".weight"))
        grad = plain.grad[plain != 0] if name.endswith(".values") else plain.grad
        torch.testing.assert_close(p.grad, grad, atol=1e-6, rtol=1e-4)
    rows = [layer.row_starts.diff() for layer in sparse_layers(sparse_model).values()]
    assert torch.cat(rows).min() == 0  # there are rows without a nonzero

    assert list(sparse_model.state_dict()) == names
    assert model_fingerprint(sparse_model) == fingerprint
    greedy = dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(
        sparse_model.generate(IDS[:, :4], **greedy), dense.generate(IDS[:, :4], **greedy)
    )

    sparse_model.to_dense()
    assert not sparse_layers(sparse_model)
    tied = sparse_model.lm_head.weight is sparse_model.transformer.wte.weight
    assert tied == sparse_model.config.tied_unembed
    assert torch.equal(sparse_model(IDS).logits, dense(IDS).logits)


def test_sites_hooks_and_edges_work_on_a_sparse_run(sparse_model):
    seen = {}
    for name, site in sparse_model.node_sites().items():
        site.register_forward_hook(lambda _m, _i, out, name=name: seen.setdefault(name, out))
    sparse_model.to_sparse()(IDS)
    assert set(seen) == set(sparse_model.node_sites())

    planted = planted_model(noise=0.0).to_sparse(threshold=1.0)
    assert isinstance(planted.transformer.h[1].mlp.c_fc, SparseLinear)
    found = {tuple(e[:4]): e.weight for e in circuit_edges(planted, PLANTED_NODES)}
    assert found == pytest.approx(PLANTED_EDGES)


def test_state_dict_loads_into_a_sparse_run(sparse_model):
    other = sparsify(random_model(sparse_model.config, seed=5), density=0.05)
    sparse_model.to_sparse()
    sparse_model.load_state_dict(other.state_dict())
    torch.testing.assert_close(sparse_model(IDS).logits, other(IDS).logits, atol=1e-5, rtol=0)
    with pytest.raises(RuntimeError, match=r"c_fc.weight has shape \(3, 3\), expected"):
        sparse_model.load_state_dict(
            {**other.state_dict(), "transformer.h.0.mlp.c_fc.weight": torch.zeros(3, 3)}
        )


def test_frozen_weights_stay_frozen(sparse_model):
    sparse_model.requires_grad_(False).to_sparse()
    assert not any(p.requires_grad for p in sparse_model.parameters())
    assert not any(p.requires_grad for p in sparse_model.to_dense().parameters())


def test_dense_layers_stay_dense(tiny_model, caplog):
    with torch.no_grad():
        tiny_model.transformer.h[0].mlp.c_fc.weight[:, 1:] = 0.0
    tiny_model.to_sparse()
    assert list(sparse_layers(tiny_model)) == ["transformer.h.0.mlp.c_fc"]
    tiny_model.to_dense()
    with caplog.at_level("WARNING"):
        tiny_model.to_sparse(threshold=0.001)
    assert "CircuitGPTForCausalLM is not sparse" in caplog.text
    assert not sparse_layers(tiny_model)


def test_bad_requests(tiny_model, sparse_model):
    with pytest.raises(ValueError, match=r"threshold=2 was passed"):
        tiny_model.to_sparse(threshold=2)
    with torch.device("meta"):
        empty = CircuitGPTForCausalLM(tiny_model.config)
    with pytest.raises(ValueError, match=r"transformer.wte.weight is not in memory"):
        empty.to_sparse()
    with pytest.raises(ValueError, match="resize_token_embeddings"):
        sparse_model.to_sparse().resize_token_embeddings(70)
