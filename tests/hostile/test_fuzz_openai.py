"""Damaged checkpoints and tokenizers in OpenAI's layouts, and checkpoints in the reproduction's."""

import json
import os
import pickle
import shutil

import pytest
import torch

from hf_circuit_sparsity import CircuitGPTForCausalLM, tokenizer_from_openai
from hf_circuit_sparsity.modeling.configuration_circuitgpt import ArtifactError
from tests.conftest import FIXTURES
from tests.hostile.harness import fuzz, plain_json


def check_model(model, folder):
    stored = torch.load(folder / "final_model.pt", weights_only=True)
    loaded = model.state_dict()
    for name, tensor in stored.items():
        name = name.removeprefix("circuit_model.")
        if name in loaded:
            torch.testing.assert_close(loaded[name], tensor.float(), rtol=0, atol=0, equal_nan=True)
    fields = plain_json(folder / "beeg_config.json")
    for name in ("n_layer", "d_model", "vocab_size", "block_size"):
        assert name not in fields or getattr(model.config, name) == fields[name]
    model(torch.arange(4)[None] % model.config.vocab_size)


@pytest.mark.parametrize("file", ["beeg_config.json", "final_model.pt"])
def test_fuzz_checkpoint(tmp_path, file):
    folder, load = FIXTURES / "reference" / "paper", CircuitGPTForCausalLM.from_openai
    outcome = fuzz(folder, file, load, check_model, tmp_path / "work")
    assert outcome["refused"] > 50 and outcome["loaded"] > 5, outcome


def check_reproduction(model, folder):
    stored = torch.load(folder / "pytorch_model.bin", weights_only=True)
    loaded = model.state_dict()
    for name, tensor in stored.items():
        name = name.replace("blocks.", "transformer.h.").replace("attn_fn", "attn_imp")
        name = name if name in loaded else f"transformer.{name}"
        torch.testing.assert_close(loaded[name], tensor.float(), rtol=0, atol=0, equal_nan=True)
    fields = plain_json(folder / "config.json").get("model_config", {})
    for name in ("n_layer", "d_model", "vocab_size", "d_mlp", "d_head"):
        assert name not in fields or getattr(model.config, name) == fields[name]
    model(torch.arange(4)[None] % model.config.vocab_size)


@pytest.mark.parametrize("file", ["config.json", "pytorch_model.bin"])
def test_fuzz_reproduction(tmp_path, file):
    folder, load = (
        FIXTURES / "reproduction" / "sparse_pretrain",
        CircuitGPTForCausalLM.from_pretrained,
    )
    outcome = fuzz(folder, file, load, check_reproduction, tmp_path / "work")
    assert outcome["refused"] > 40 and outcome["loaded"] > 5, outcome


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("as_archive", [True, False])
@pytest.mark.parametrize(
    ("load", "config", "weights"),
    [
        (CircuitGPTForCausalLM.from_openai, "reference/paper/beeg_config.json", "final_model.pt"),
        (
            CircuitGPTForCausalLM.from_pretrained,
            "reproduction/sparse_pretrain/config.json",
            "pytorch_model.bin",
        ),
    ],
    ids=["openai", "reproduction"],
)
def test_nothing_in_a_pickle_is_executed(tmp_path, as_archive, load, config, weights):
    shutil.copy(FIXTURES / config, tmp_path)
    content = {"transformer.wte.weight": Payload(tmp_path / "made")}
    if as_archive:
        torch.save(content, tmp_path / weights)
    else:
        (tmp_path / weights).write_bytes(pickle.dumps(content))
    with pytest.raises(ArtifactError, match=f"{weights} is not a readable"):
        load(tmp_path)
    assert not (tmp_path / "made").exists()


def check_tokenizer(tokenizer, folder):
    vocab = plain_json(folder / "encoder.json")
    assert tokenizer.get_vocab() == vocab
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    lines = (folder / "vocab.bpe").read_text(encoding="utf-8").split("\n")
    lines = lines[1:] if lines[0].startswith("#version") else lines
    assert [list(merge) for merge in merges] == [line.split(" ") for line in lines if line]


@pytest.mark.parametrize("file", ["encoder.json", "vocab.bpe"])
def test_fuzz_tokenizer(tmp_path, file):
    outcome = fuzz(
        FIXTURES / "tokenizer", file, tokenizer_from_openai, check_tokenizer, tmp_path / "work",
        refusal=ValueError, mutations=200,
    )  # fmt: skip
    assert outcome["refused"] > 50, outcome
