"""Weights held as nonzeros while they are trained: the same run, and nothing dense."""

import copy

import pytest
import torch
from safetensors.torch import load_file

from hf_circuit_sparsity import (
    CircuitGPTConfig,
    CircuitGPTForCausalLM,
    RCDConfig,
    RCDSparseOptimizer,
    TopKAdamW,
    load_causal_lm,
    sparse_from_config,
    sparse_param_groups,
    sparsify_initialization_,
)
from hf_circuit_sparsity.modeling.causal_lm import weights_file
from hf_circuit_sparsity.modeling.sparse_layers import sparse_layers, to_dense
from tests.optim.conftest import Largest, train
from tests.trainer.runs import training_logs, whole_and_resumed

SETTINGS = {"lr": 0.1, "target_density": 1 / 8, "block_fraction": 1 / 4, "selection": "gradient",
            "normalize_gradients": "always"}  # fmt: skip


@pytest.mark.parametrize(
    "settings",
    [{}, {"block": "columns", "block_steps": 2}, {"selection": "magnitude", "block": "entries"},
     {"clip_threshold": 0.01, "block_steps": 2},
     {"start_density": 1 / 4, "total_steps": 8, "explore_end": 0.7}],
)  # fmt: skip
def test_training_the_nonzeros_is_training_the_matrices(tiny_config, settings, either_path):
    sparse = sparse_from_config(tiny_config, settings.get("start_density", 1 / 8), seed=3)
    dense = copy.deepcopy(sparse).to_dense()
    batches = [torch.arange(64).reshape(4, 16)] * 8
    ours, optimizer = train(sparse, batches, **{**SETTINGS, **settings})
    theirs, _ = train(dense, batches, **{**SETTINGS, **settings})
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert ours[-1] < ours[0]
    for name, value in dense.state_dict().items():
        torch.testing.assert_close(sparse.state_dict()[name], value, atol=1e-4, rtol=0)
    for name, layer in sparse_layers(sparse).items():
        budget = max(layer.shape[0] * layer.shape[1] // 8, layer.shape[0] * 4)
        assert len(layer.columns) == len(layer.values) <= budget, name
        assert layer.values.grad is None
    assert 1 / 10 < optimizer.density < 1 / 5


@pytest.mark.parametrize("fields", [{}, {"tie_word_embeddings": False}])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_other_decoders_are_trained_by_their_nonzeros_too(kind, fields, make_gpt2, make_llama):
    config = {"gpt2": make_gpt2, "llama": make_llama}[kind](**fields).config
    sparse = sparse_from_config(config, 1 / 8, seed=3)
    dense = to_dense(copy.deepcopy(sparse))
    tied = fields.get("tie_word_embeddings", config.tie_word_embeddings)
    inputs, outputs = sparse.get_input_embeddings(), sparse.get_output_embeddings()
    assert (inputs.values is outputs.values) == tied
    batches = [torch.arange(60).reshape(4, 15)] * 8
    ours, _ = train(sparse, batches, **{**SETTINGS, "block_steps": 2})
    theirs, _ = train(dense, batches, **{**SETTINGS, "block_steps": 2})
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert ours[-1] < ours[0]
    for name, value in dense.state_dict().items():
        torch.testing.assert_close(sparse.state_dict()[name], value, atol=1e-4, rtol=0)
    if tied:  # they grew alike
        assert torch.equal(inputs.columns, outputs.columns)
    prompt = torch.arange(5)[None]
    said = [m.eval().generate(prompt, max_new_tokens=6, do_sample=False) for m in (sparse, dense)]
    assert torch.equal(*said)


def test_a_start_without_matrices_is_as_a_thinned_out_one(tiny_config):
    torch.manual_seed(0)
    made, plain = sparse_from_config(tiny_config, 1 / 4), CircuitGPTForCausalLM(tiny_config)
    sparsify_initialization_(plain, 1 / 4)
    state = made.state_dict()
    assert state.keys() == plain.state_dict().keys()
    for name, p in plain.state_dict().items():
        q = state[name]
        assert int(torch.count_nonzero(q)) == int(torch.count_nonzero(p)), name
        if p.ndim < 2:
            assert torch.equal(p, q), name
    rows = (state["lm_head.weight"] != 0).sum(1)
    assert rows.max() - rows.min() <= 1
    again = sparse_from_config(tiny_config, 1 / 4)
    assert all(torch.equal(v, again.state_dict()[n]) for n, v in state.items())
    # Not trained: logits are about as large as with dense weights.
    batch = torch.arange(32)[None]
    assert made(batch, labels=batch).loss.item() == pytest.approx(4.159, abs=0.05)
    with pytest.raises(ValueError, match="density"):
        sparse_from_config(tiny_config, 0)


def test_nothing_of_a_matrix_size_is_ever_made():
    config = CircuitGPTConfig(n_layer=1, d_model=384, d_head=16, d_mlp=1024, vocab_size=512,
                              block_size=16, enable_bigram_table=False)  # fmt: skip
    smallest = 384 * 384
    batch = torch.arange(16)[None]
    with Largest() as made:
        model = sparse_from_config(config, 1 / 64, min_nonzeros=2)
        started, made.entries = made.entries, 0
        train(model, [batch] * 3, lr=0.01, target_density=1 / 64)
        model(batch)
    # Places are drawn for a piece of rows at a time; training stays below the smallest matrix.
    assert started <= 1 << 20
    assert 1024 <= made.entries < smallest


def test_an_optimizer_that_was_not_told_the_layers_says_so(tiny_config):
    model = sparse_from_config(tiny_config, 1 / 8)
    optimizer = RCDSparseOptimizer(sparse_param_groups(model), **SETTINGS)
    model(torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    with pytest.raises(ValueError, match="PartialGradients"):
        optimizer.step()
    with pytest.raises(ValueError, match="to_dense"):
        TopKAdamW(sparse_param_groups(model), target_density=1 / 8, total_steps=3)


@pytest.fixture(params=["circuitgpt", "gpt2", "llama"])
def make_nonzeros(request, tiny_config, make_gpt2, make_llama):
    """A model, of three architectures, that runs on its nonzeros."""
    if request.param == "circuitgpt":
        return lambda seed: sparse_from_config(tiny_config, 1 / 4, seed=seed)
    # GPT-2's embedding is tied.
    config = {"gpt2": make_gpt2, "llama": make_llama}[request.param]().config
    return lambda seed: sparse_from_config(config, 1 / 4, seed=seed)


@pytest.mark.parametrize(
    "rule",
    [{}, {"clip_threshold": 0.02}, {"replace_fraction": 0.2, "grace_steps": 2, "rest_steps": 1}],
    ids=["outgrowing", "clipping", "replacing"],
)
def test_the_trainer_saves_nonzeros_and_resumes_bit_for_bit(make_nonzeros, make_trainer, rule):
    settings = {
        "sparsifier": "rcd",
        "rcd_config": RCDConfig(block_steps=2, block_fraction=0.25, start_density=1 / 4, **rule),
    }

    models = [make_nonzeros(seed) for seed in (0, 0, 9)]
    whole, second, checkpoint = whole_and_resumed(make_trainer, models, 5, **settings)
    assert any(name.endswith(".columns") for name in load_file(weights_file(checkpoint)))
    saved = load_causal_lm(checkpoint)
    assert type(saved) is type(models[1])
    assert torch.equal(saved.lm_head.weight, models[1].lm_head.weight)
    for name, layer in sparse_layers(whole.model).items():
        assert torch.equal(layer.columns, second.model.get_submodule(name).columns)
    logs = training_logs(whole)
    assert all(0 < entry["nonzero_fraction"] <= 0.26 for entry in logs)
    assert any(entry["mask_churn"] > 0 for entry in logs)
