"""`hf-circuit-sparsity evaluate`, at the size of a test."""

import json
import shutil

import pytest
import torch
from transformers import AutoTokenizer

from hf_circuit_sparsity import Circuit, CircuitGPTForCausalLM
from hf_circuit_sparsity.circuits.task_scores import evaluate_tasks
from hf_circuit_sparsity.cli import main
from tests.circuits.planted import planted_model, word_tokenizer
from tests.conftest import FIXTURES


def test_table_and_json(saved, capsys):
    tasks = ["while_return_true", "single_double_quote"]
    options = [part for task in tasks for part in ("--task", task)]
    assert main(["evaluate", "--model", str(saved), *options, "--prompts", "32"]) == 0
    printed = capsys.readouterr().out
    content = json.loads((saved / "task_evaluation.json").read_text())
    assert [score["task"] for score in content["tasks"]] == tasks
    for score in content["tasks"]:
        # An untrained model guesses.
        assert score["loss"] == pytest.approx(0.693, abs=0.05) and score["prompts"] == 32
        assert score["task"] in printed and f"{score['loss']:.3f}" in printed
    assert "0 of 2 learned" in printed and len(content["model_fingerprint"]) == 16


def test_tasks_that_cannot_be_asked_say_why(saved):
    model = CircuitGPTForCausalLM.from_pretrained(saved)
    model.config.block_size = 20
    names, tokenizer = ["single_double_quote"], AutoTokenizer.from_pretrained(saved)
    (score,) = evaluate_tasks(model, tokenizer, names, n_train=64, n_test=64, progress=False)
    assert score.accuracy is None and "max_length" in score.problem
    # A tokenizer of whole words has one token for everything it does not know.
    (score,) = evaluate_tasks(
        planted_model(), word_tokenizer(), ["while_return_true"], progress=False
    )
    assert score.loss is None and "while_return_true" in score.problem


def test_commands_take_a_model_in_the_reproductions_layout(saved, corpus, tmp_path):
    """With a tokenizer beside it, and a vocabulary of that tokenizer's size."""
    folder = tmp_path / "model"
    shutil.copytree(saved, folder, ignore=shutil.ignore_patterns("config.json", "*.safetensors"))
    for name in ("config.json", "pytorch_model.bin"):
        shutil.copyfile(FIXTURES / "reproduction" / "sparse_pretrain" / name, folder / name)
    size = len(AutoTokenizer.from_pretrained(saved))
    config = json.loads((folder / "config.json").read_text())
    config["model_config"] |= {"vocab_size": size, "n_ctx": 64}
    (folder / "config.json").write_text(json.dumps(config))
    weights = torch.load(folder / "pytorch_model.bin", weights_only=True)
    for name in ("wte.weight", "lm_head.weight"):
        weights[name] = torch.randn(size, 32, generator=torch.Generator().manual_seed(0)) / 10
    torch.save(weights, folder / "pytorch_model.bin")
    task = ["--task", "while_return_true"]
    assert main(["evaluate", "--model", str(folder), *task, "--prompts", "32"]) == 0
    prune = ["prune", *task, "--target-loss", "0.9", "--max-steps", "2", "--batch-size", "2"]
    prune += ["--selection-prompts", "32"]
    circuit = tmp_path / "circuit"
    prune += ["--model", str(folder), "--corpus", str(corpus), "--output-dir", str(circuit)]
    assert main(prune) == 0
    Circuit.from_pretrained(circuit).check_model(CircuitGPTForCausalLM.from_pretrained(folder))
