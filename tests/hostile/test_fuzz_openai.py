"""Damaged checkpoints and tokenizers in OpenAI's layouts."""

import json
import os
import pickle

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


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("as_archive", [True, False])
def test_nothing_in_a_pickle_is_executed(tmp_path, as_archive):
    fields = (FIXTURES / "reference" / "paper" / "beeg_config.json").read_bytes()
    (tmp_path / "beeg_config.json").write_bytes(fields)
    content = {"transformer.wte.weight": Payload(tmp_path / "made")}
    if as_archive:
        torch.save(content, tmp_path / "final_model.pt")
    else:
        (tmp_path / "final_model.pt").write_bytes(pickle.dumps(content))
    with pytest.raises(ArtifactError, match=r"final_model\.pt is not a readable"):
        CircuitGPTForCausalLM.from_openai(tmp_path)
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
