"""Damaged model checkpoints that hold only the nonzeros."""

import numpy as np
import pytest
import torch

from hf_circuit_sparsity.modeling.causal_lm import NONZEROS_NAME, load_causal_lm, save_nonzeros
from hf_circuit_sparsity.modeling.configuration_circuitgpt import CircuitGPTConfig
from hf_circuit_sparsity.modeling.modeling_circuitgpt import CircuitGPTForCausalLM
from tests.conftest import random_model, sparsify
from tests.hostile.harness import fuzz, plain_json, plain_tensors


@pytest.fixture
def artifact(tmp_path):
    config = CircuitGPTConfig(
        n_layer=1, n_head=2, d_head=4, d_model=16, d_mlp=16, block_size=8, vocab_size=24
    )
    sparsify(random_model(config)).save_pretrained(tmp_path / "model", sparse=True)
    return tmp_path / "model"


def plain_weights(path):
    """The weights in a sparse file, dense or as rows, columns and values."""
    stored, weights = plain_tensors(path), {}
    for name, tensor in stored.items():
        if name.endswith(".values"):
            owner = name.removesuffix(".values")
            counts, columns = stored[f"{owner}.row_counts"], stored[f"{owner}.columns"]
            weights[owner] = np.repeat(np.arange(len(counts)), counts), columns, tensor
        elif not name.endswith((".columns", ".row_counts")):
            weights[name] = tensor
    return weights


def check(model, folder):
    config = plain_json(folder / "config.json")
    for name in ("n_layer", "n_head", "d_model", "d_head", "d_mlp", "block_size", "vocab_size"):
        assert name not in config or getattr(model.config, name) == config[name], name
    (path,) = folder.glob("*.safetensors")
    weights, loaded = plain_weights(path), model.state_dict()
    assert set(weights) == loaded.keys() - (model.all_tied_weights_keys or {}).keys()
    for name, expected in weights.items():
        tensor = loaded[name].float().numpy()
        if isinstance(expected, tuple):
            rows, columns, values = expected
            expected = np.zeros(tensor.shape, values.dtype)
            expected[rows, columns] = values
        assert np.array_equal(tensor, expected, equal_nan=True), name
    model(torch.arange(4)[None])


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_fuzz(artifact, tmp_path, file, sparse):
    def load(folder):
        return CircuitGPTForCausalLM.from_pretrained(folder, sparse=sparse)

    outcome = fuzz(artifact, file, load, check, tmp_path / "work")
    assert outcome["refused"] > 50 and outcome["loaded"] > 5, outcome


@pytest.mark.parametrize("sparse", [False, True])
def test_fuzz_of_another_architecture(make_gpt2, tmp_path, sparse):
    save_nonzeros(sparsify(make_gpt2()), tmp_path / "model")
    outcome = fuzz(
        tmp_path / "model", NONZEROS_NAME, lambda folder: load_causal_lm(folder, sparse=sparse),
        check, tmp_path / "work",
    )  # fmt: skip
    assert outcome["refused"] > 50 and outcome["loaded"] > 5, outcome
