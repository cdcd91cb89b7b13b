"""Training the weights of one circuit, and no others."""

import importlib
import sys

import pytest
import torch
from peft import PeftModel, PeftType, get_peft_model
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from hf_circuit_sparsity import load_causal_lm
from hf_circuit_sparsity.adapters import CircuitPeftConfig
from hf_circuit_sparsity.circuits.ablation import reference_means
from hf_circuit_sparsity.circuits.circuit import Circuit
from hf_circuit_sparsity.circuits.task_scores import pair_logits
from hf_circuit_sparsity.modeling.fingerprint import model_fingerprint
from tests.circuits.planted import (
    NO,
    PLANTED_EDGES,
    YES,
    on_off_task,
    planted_circuit,
    planted_model,
    reference_ids,
)  # fmt: skip
from tests.decoders.dense_models import DENSE, PARALLEL

IDS = reference_ids()[:4]


@pytest.fixture
def model():
    return planted_model()


@pytest.fixture
def config(model) -> CircuitPeftConfig:
    return CircuitPeftConfig.from_circuit(planted_circuit(model), model)


def shaken(peft_model):
    """Give every trainable value something to do."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    return peft_model


def test_it_is_the_circuits_edges_that_are_trained(model, config):
    config.base_model_fingerprint = ""  # which depends on the precision
    peft_model = get_peft_model(model.double(), config)
    trainable = [p for p in peft_model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trainable) == len(PLANTED_EDGES)
    with torch.no_grad():
        whole = planted_model().double()(IDS).logits
        assert torch.equal(peft_model(IDS).logits, whole)  # nothing is changed at first
        # By hand: add to the very weights that were planted.
        plain = planted_model().double()
        first, second = plain.transformer.h[0].attn, plain.transformer.h[1].mlp
        first.c_attn.weight[2 * 8 + 5, 0] += 0.5
        first.c_proj.weight[3, 5] += 0.5
        second.c_fc.weight[7, 3] += 0.5
        second.c_proj.weight[4, 7] += 0.5
        for parameter in trainable:
            parameter.fill_(0.5)
        torch.testing.assert_close(peft_model(IDS).logits, plain(IDS).logits)
        assert not torch.allclose(plain(IDS).logits, whole)
        with peft_model.disable_adapter():
            assert torch.equal(peft_model(IDS).logits, whole)
        merged = peft_model.merge_and_unload()
    assert plain.state_dict().keys() == merged.state_dict().keys()
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name], tensor)


@torch.no_grad()
def test_merging_is_undone(model, config):
    peft_model = shaken(get_peft_model(model, config))
    adapted = peft_model(IDS).logits
    for step in (peft_model.merge_adapter, peft_model.unmerge_adapter):
        step()
        torch.testing.assert_close(peft_model(IDS).logits, adapted)


@pytest.mark.parametrize("tokens", [[], [YES, NO]])
def test_it_is_saved_in_a_few_kilobytes_and_comes_back(model, tokens, tmp_path):
    config = CircuitPeftConfig.from_circuit(planted_circuit(model), model, tokens)
    peft_model = shaken(get_peft_model(model, config))
    peft_model.save_pretrained(str(tmp_path))
    size = sum(path.stat().st_size for path in tmp_path.glob("adapter*"))
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == {
        f"base_model.model.{name}.circuit_values" for name in config.edges
    }
    assert size < 4096
    again = PeftModel.from_pretrained(planted_model(), str(tmp_path))
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, peft_model(IDS).logits)


def test_it_learns_the_opposite_answer(model):
    config = CircuitPeftConfig.from_circuit(planted_circuit(model), model, tokens=[YES, NO])
    assert sum(map(len, config.edges.values())) == len(PLANTED_EDGES) + 4
    peft_model = get_peft_model(model, config)
    train, test = on_off_task().tensors("train"), on_off_task().tensors("test")

    def opposite_loss(tensors):
        pairs = pair_logits(peft_model, tensors)
        return F.softplus(pairs[:, 0] - pairs[:, 1]).mean()

    with torch.no_grad():
        assert opposite_loss(test) > 2
    optimizer = torch.optim.Adam([p for p in peft_model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(80):
        optimizer.zero_grad()
        opposite_loss(train).backward()
        optimizer.step()
    with torch.no_grad():
        assert opposite_loss(test) < 0.3


def test_only_the_edges_into_some_sites(model):
    config = CircuitPeftConfig.from_circuit(planted_circuit(model), model, into=["resid_delta"])
    assert config.edges == {
        "transformer.h.0.attn.c_proj": [[3, 5]],
        "transformer.h.1.mlp.c_proj": [[4, 7]],
    }


def test_two_adapters(model, config, tmp_path):
    peft_model = shaken(get_peft_model(model, config))
    peft_model.save_pretrained(str(tmp_path))
    with torch.no_grad():
        first = peft_model(IDS).logits
        peft_model.add_adapter("second", config)
        peft_model.set_adapter("second")
        assert torch.equal(peft_model(IDS).logits, planted_model()(IDS).logits)
        peft_model.load_adapter(str(tmp_path), "third")
        peft_model.set_adapter("third")
        assert torch.equal(peft_model(IDS).logits, first)


def test_it_is_one_of_pefts_methods(model, config):
    assert config.peft_type is PeftType["CIRCUIT_EDGES"] is PeftType("CIRCUIT_EDGES")
    with pytest.raises(ValueError, match="CIRCUIT_EDGES"):
        get_peft_model(model, config, mixed=True)


@pytest.mark.parametrize(("autocast", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_precision_of_the_values(model, config, autocast, dtype):
    config.base_model_fingerprint = ""
    peft_model = get_peft_model(model.bfloat16(), config, autocast_adapter_dtype=autocast)
    assert {p.dtype for p in peft_model.parameters() if p.requires_grad} == {dtype}


def test_what_does_not_fit_is_refused(model, config):
    with pytest.raises(ValueError, match="'on_off'"):
        get_peft_model(planted_model(seed=1), config)
    for name, position in [
        ("transformer.h.9.mlp.c_fc", [0, 0]),
        ("transformer.h.0.ln_1", [0, 0]),
        ("lm_head", [99, 0]),
    ]:
        with pytest.raises(ValueError, match=name):
            get_peft_model(planted_model(), CircuitPeftConfig(edges={name: [position]}))
    with pytest.raises(ValueError, match="lm_head"):
        CircuitPeftConfig(edges={"lm_head": [[1, 2], [1, 2]]})
    circuit = Circuit({}, planted_circuit(model).means, "on_off", model_fingerprint(model))
    with pytest.raises(ValueError, match="edge"):
        CircuitPeftConfig.from_circuit(circuit, model)


ARCHITECTURES = {**DENSE, **PARALLEL}


@pytest.mark.parametrize("make", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_circuits_of_every_architecture(make, tmp_path):
    model = make().double()
    means = reference_means(model, IDS).nodes
    nodes = {site: [0, 3, 5] for site in means if site.startswith("h.1") or site.endswith("delta")}
    circuit = Circuit(nodes, means, "task", model_fingerprint(model))
    config = CircuitPeftConfig.from_circuit(circuit, model, tokens=[2, 7])
    count = len(circuit.edges(model)) + 2 * 3
    assert sum(map(len, config.edges.values())) == count
    whole = model(IDS, labels=IDS, use_cache=False)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight

    peft_model = get_peft_model(make().double(), config, autocast_adapter_dtype=False)
    trained = [p for p in peft_model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == count
    start = peft_model(IDS, labels=IDS, use_cache=False)
    assert torch.equal(start.logits, whole.logits)
    start.loss.backward()
    if tied:  # the gradient of the unembedding alone
        unembedding = model.get_output_embeddings()
        unembedding.weight = torch.nn.Parameter(unembedding.weight.detach().clone())
    model(IDS, labels=IDS, use_cache=False).loss.backward()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    index = {}
    for name, pairs in config.edges.items():
        rows, columns = torch.tensor(pairs).T
        layer = model.get_submodule(name)
        index[name] = (columns, rows) if isinstance(layer, Conv1D) else (rows, columns)
        values = peft_model.get_submodule(f"base_model.model.{name}").circuit_values["default"]
        torch.testing.assert_close(values.grad, layer.weight.grad[index[name]])

    shaken(peft_model)
    adapted = peft_model(IDS, use_cache=False).logits
    assert not torch.allclose(adapted, whole.logits)
    peft_model.save_pretrained(str(tmp_path / "adapter"))
    again = PeftModel.from_pretrained(
        make().double(), str(tmp_path / "adapter"), autocast_adapter_dtype=False
    )
    torch.testing.assert_close(again(IDS, use_cache=False).logits, adapted)
    merged = peft_model.merge_and_unload()
    torch.testing.assert_close(merged(IDS, use_cache=False).logits, adapted)
    for name, tensor in merged.state_dict().items():
        owner = name.removesuffix(".weight")
        changed = torch.zeros_like(tensor, dtype=torch.bool)
        if owner in index:
            changed[index[owner]] = True
        assert torch.equal(tensor != before[name], changed), name
    merged.save_pretrained(tmp_path / "merged")
    loaded = load_causal_lm(tmp_path / "merged")
    # Gemma's constants are made in float32 here.
    torch.testing.assert_close(loaded(IDS, use_cache=False).logits, adapted, atol=1e-5, rtol=1e-4)


def test_without_peft_the_error_says_what_to_install(monkeypatch):
    for name in [n for n in sys.modules if n.startswith("hf_circuit_sparsity.adapters")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "peft", None)  # as where it is not installed
    with pytest.raises(ImportError, match="pip install"):
        importlib.import_module("hf_circuit_sparsity.adapters")
