"""Models of any architecture on their nonzeros and by their nonzeros."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from hf_circuit_sparsity.modeling.causal_lm import (
    NONZEROS_NAME,
    SparseConv1D,
    load_causal_lm,
    save_nonzeros,
    saving_nonzeros,
)
from hf_circuit_sparsity.modeling.configuration_circuitgpt import ArtifactError
from hf_circuit_sparsity.modeling.fingerprint import model_fingerprint
from hf_circuit_sparsity.modeling.sparse_layers import (
    SPARSE_LAYERS,
    sparse_layers,
    to_dense,
    to_sparse,
)
from hf_circuit_sparsity.optim.weight_mask import extract_mask
from tests.conftest import sparsify
from tests.decoders.dense_models import DENSE, PARALLEL, PHI3, from_config, gpt2
from tests.modeling.test_sparse_checkpoint import COUNTS, DAMAGE

IDS = torch.arange(24).reshape(2, 12)
TIED = {"num_key_value_heads": 1, "tie_word_embeddings": True}
MODELS = {
    **DENSE, **PARALLEL, **PHI3,
    "untied gpt2": lambda: gpt2(tie_word_embeddings=False),
    "tied llama": lambda: from_config("llama", **TIED, pad_token_id=1),
    "tied gemma3_text": lambda: from_config("gemma3_text", **TIED, head_dim=16),
}  # fmt: skip


@torch.no_grad()
def logits_of(model):
    return model(IDS, use_cache=False).logits


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_nonzeros_are_the_model(make, tmp_path):
    model = sparsify(make(), 0.12)
    dense, layers, mask = copy.deepcopy(model), [*model.named_modules()], extract_mask(model)
    expected, fingerprint = logits_of(model), model_fingerprint(model)
    assert expected.std() > 0.01
    assert to_sparse(model, threshold=0.3) is model
    layers = [name for name, module in layers if type(module) in SPARSE_LAYERS]
    if "gemma3" in model.config.model_type:
        # The embedding multiplies what it looks up, so it stays, and with it what is tied to it.
        left = {layers.pop(-1)} if model.config.tie_word_embeddings else set()
        assert left <= {"lm_head"}
    assert list(sparse_layers(model)) == layers
    on_nonzeros = extract_mask(model)
    assert on_nonzeros.shapes == mask.shapes and mask.overlap(on_nonzeros) == 1.0
    assert on_nonzeros.nonzeros() == mask.nonzeros()
    torch.testing.assert_close(logits_of(model), expected, atol=1e-4, rtol=1e-4)
    greedy = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    generated = dense.generate(IDS[:, :4], **greedy)
    assert torch.equal(model.generate(IDS[:, :4], **greedy), generated)

    for number, saved in enumerate([model, dense]):
        folder = tmp_path / str(number)
        save_nonzeros(saved, folder)
        read, run = load_causal_lm(folder), load_causal_lm(folder, sparse=True)
        assert type(read) is type(run) is type(dense) and not run.training
        assert not sparse_layers(read) and sparse_layers(run)
        assert torch.equal(logits_of(read), expected)
        torch.testing.assert_close(logits_of(run), expected, atol=1e-4, rtol=1e-4)
        assert torch.equal(run.generate(IDS[:, :4], **greedy), generated)
        assert model_fingerprint(read) == model_fingerprint(run) == fingerprint
        run.save_pretrained(tmp_path / f"dense{number}")  # as transformers does it
        again = load_causal_lm(tmp_path / f"dense{number}", sparse=True)
        assert sparse_layers(again) and model_fingerprint(again) == fingerprint
    to_dense(model)
    assert not sparse_layers(model) and torch.equal(logits_of(model), expected)
    tables = [m.get_input_embeddings().weight is m.get_output_embeddings().weight
              for m in (model, read, dense)]  # fmt: skip
    assert tables[0] == tables[1] == tables[2]


def test_gradients_are_those_of_the_dense_layers():
    model = sparsify(MODELS["tied llama"]())
    with torch.no_grad():  # the padding's row, which is not trained, is not zero
        model.get_input_embeddings().weight[1, :3] = 0.5
    dense = copy.deepcopy(model)
    to_sparse(model, threshold=1.0)
    ids = torch.randint(0, 64, (4, 12), generator=torch.manual_seed(0))
    ids[:, :3] = 1
    for m in (model, dense):
        m(ids, labels=ids).loss.backward()
    for name, layer in sparse_layers(model).items():
        weight = dense.get_submodule(name).weight
        torch.testing.assert_close(layer.values.grad, weight.grad[weight != 0])
    assert to_dense(model).get_input_embeddings().padding_idx == 1


@pytest.mark.usefixtures("either_path")
@pytest.mark.parametrize("density", [0.0, 0.3])
def test_conv1d(density):
    dense = sparsify(Conv1D(9, 6).double(), density)
    nn.init.normal_(dense.bias)
    sparse = to_sparse(nn.Sequential(copy.deepcopy(dense)), threshold=1.0)
    assert type(sparse[0]) is SparseConv1D
    x = torch.randn(2, 3, 6, dtype=torch.float64, generator=torch.manual_seed(0))
    for layer in (sparse[0], dense):
        x = x.detach().requires_grad_()
        y = layer(x)
        parameters = [x, layer.bias, layer.values if layer is not dense else layer.weight]
        gradients = torch.autograd.grad(y.sin().sum(), parameters, create_graph=True)
        (second,) = torch.autograd.grad(gradients[0].square().sum(), x, allow_unused=True)
        results = (y, *gradients[:2], second, gradients[2])
        layer.results = results
    *ours, values = sparse[0].results
    *theirs, weight = dense.results
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(values, weight[dense.weight != 0])


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize(("message", "damage"), DAMAGE)
def test_damage_is_refused_as_for_circuitgpt(tmp_path, message, damage, sparse):
    save_nonzeros(sparsify(gpt2(n_inner=32)), tmp_path)
    path = tmp_path / NONZEROS_NAME
    tensors = load_file(path)
    row = int((tensors[COUNTS] >= 2).nonzero()[0])
    damage(tensors, int(tensors[COUNTS][:row].sum()))
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=message) as refused:
        load_causal_lm(tmp_path, sparse=sparse)
    assert str(path) in str(refused.value)


def test_transformers_alone_finds_no_weights(make_gpt2, tmp_path):
    model = sparsify(make_gpt2())
    model.save_pretrained(tmp_path)
    save_nonzeros(model, tmp_path)  # takes the place of the dense model
    with pytest.raises(OSError, match="no file named"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=NONZEROS_NAME):
        load_causal_lm(tmp_path)


def test_what_the_loader_passes_on(make_gpt2, tmp_path):
    save_nonzeros(sparsify(make_gpt2()).bfloat16(), tmp_path)
    model = load_causal_lm(tmp_path, sparse=True, attn_implementation="eager")
    assert model.dtype == torch.bfloat16 and model.config._attn_implementation == "eager"
    assert load_causal_lm(tmp_path, dtype=torch.float32).dtype == torch.float32
    assert model.name_or_path == str(tmp_path)


def test_an_untied_pair_is_stored_twice_whatever_the_config_says(make_gpt2, tmp_path):
    model = sparsify(make_gpt2())
    model.lm_head.weight = nn.Parameter(2 * model.lm_head.weight.detach())
    for sparse in (False, True):
        save_nonzeros(model, tmp_path)
        again = load_causal_lm(tmp_path, sparse=sparse)
        assert torch.equal(again.lm_head.weight, model.lm_head.weight)
        assert torch.equal(again.transformer.wte.weight, model.transformer.wte.weight)
        to_sparse(model, threshold=1.0)


def test_nonzeros_on_the_hub(hub_server, make_llama):
    model = sparsify(make_llama())
    with saving_nonzeros(model):
        model.push_to_hub("ada/llama")
    again = load_causal_lm("ada/llama", sparse=True)
    assert sparse_layers(again) and model_fingerprint(again) == model_fingerprint(model)
