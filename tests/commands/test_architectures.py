"""The commands on models of other architectures than CircuitGPT."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from hf_circuit_sparsity import Circuit, list_circuits, load_causal_lm, save_nonzeros
from hf_circuit_sparsity.circuits.viewer.report_data import ReportConfig
from hf_circuit_sparsity.cli import main
from hf_circuit_sparsity.commands import publication
from tests.commands.test_prune import GUESSING
from tests.conftest import sparsify


def gpt2(words: int) -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(
        vocab_size=words, n_positions=64, n_embd=16, n_layer=1, n_head=2, bos_token_id=0,
        eos_token_id=0,
    ))  # fmt: skip


def llama(words: int) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=words, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, bos_token_id=0,
        eos_token_id=0,
    ))  # fmt: skip


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def other(request, saved, tmp_path_factory) -> Path:
    """A folder with an untrained model, the Llama by its nonzeros, and its tokenizer."""
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = AutoTokenizer.from_pretrained(saved)
    torch.manual_seed(0)
    if request.param == "gpt2":
        gpt2(len(tokenizer)).save_pretrained(folder)
    else:
        save_nonzeros(sparsify(llama(len(tokenizer))), folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_from_the_tasks_to_the_hub(other, corpus, hub_server, monkeypatch, capsys):
    assert main(["evaluate", "--model", str(other), "--task", "with_as", "--prompts", "8"]) == 0
    assert json.loads((other / "task_evaluation.json").read_text())["tasks"]

    reading = ["--corpus", str(corpus)]
    assert main(["prune", "--model", str(other), *GUESSING, *reading]) == 0
    folder = other / "circuits" / "while_return_true"
    model = load_causal_lm(other)
    circuit = Circuit.from_pretrained(folder)
    circuit.check_model(model)
    # What a model that knows nothing needs is nothing; a page needs something to show.
    replace(circuit, nodes={site: [1, 3] for site in circuit.means}).save_pretrained(folder)
    assert main(["view", str(folder), *reading]) == 0
    assert (folder / "index.html").stat().st_size > 10_000
    assert main(["verify", str(folder), *reading]) == 2  # the task is not learned
    assert "Traceback" not in capsys.readouterr().err

    monkeypatch.setattr(publication, "ROWS", {"n_train": 32, "n_test": 16})
    small = ReportConfig(prompts=8, text_tokens=256, examples=1)
    monkeypatch.setattr(publication, "REPORT", small)
    assert main(["publish", str(other), "--repo", "ada/other", *reading]) == 0
    published = AutoModelForCausalLM.from_pretrained("ada/other")  # as anybody loads it
    assert type(published) is type(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(published.state_dict()[name], tensor), name
    (place,) = list_circuits("ada/other")
    place.load().check_model(published)
    for name in ("ada/other", "ada/other-circuits"):
        card = ModelCard.load(name)
        assert "circuitgpt" not in str(card).lower(), name
    data = ModelCard.load("ada/other").data
    assert "custom_code" not in data.tags and data.license is None
    assert not [f for f in HfApi().list_repo_files("ada/other") if f.endswith(".py")]


def test_what_is_not_there_is_said(other, saved, tmp_path, corpus, capsys):
    def refusal(*command: str) -> str:
        assert main([*command]) == 2
        error = capsys.readouterr().err
        assert "Traceback" not in error and not (tmp_path / "out").exists()
        return error

    alone = tmp_path / "alone"
    load_causal_lm(other).save_pretrained(alone)
    assert "tokenizer" in refusal("evaluate", "--model", str(alone), "--task", "with_as")
    bridge = ["bridge", "--output-dir", str(tmp_path / "out"), "--corpus", str(corpus)]
    bridge += ["--dense-model", str(saved), "--sparse-model", str(other)]
    assert type(load_causal_lm(other)).__name__ in refusal(*bridge)
