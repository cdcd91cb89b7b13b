"""`hf-circuit-sparsity bridge` as a person calls it, at the size of a test."""

import json

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from hf_circuit_sparsity import (
    BridgedCausalLM,
    CircuitGPTConfig,
    CircuitGPTForCausalLM,
    build_corpus,
    train_tokenizer,
)
from hf_circuit_sparsity.cli import main


@pytest.fixture(scope="module")
def dense(corpus, tmp_path_factory):
    """A folder with a GPT-2 and its tokenizer."""
    folder = tmp_path_factory.mktemp("dense")
    tokenizer = train_tokenizer(build_corpus(corpus)["train"], vocab_size=400)
    end = tokenizer.eos_token_id
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=64, n_embd=16, n_layer=1, n_head=2,
        bos_token_id=end, eos_token_id=end,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def bridge(dense, corpus, output, *more):
    return main([
        "bridge", "--dense-model", str(dense), "--output-dir", str(output), "--corpus",
        str(corpus), "--block-size", "64", "--per-device-train-batch-size", "4",
        "--per-device-eval-batch-size", "8", "--report-to", "none", "--target-density", "0.2",
        "--use-cpu", "--logging-steps", "5", "--max-steps", "10", *more,
    ])  # fmt: skip


def test_bridge_writes_a_bridge_and_its_sparse_model(dense, corpus, tmp_path, capsys):
    folder = tmp_path / "bridge"
    assert bridge(dense, corpus, folder, "--d-model", "32", "--ridge-start", "True") == 0
    printed = capsys.readouterr().out
    for expected in ("to dense", "layer 0 attention", "KL dense→sparse", "Next:", str(folder)):
        assert expected in printed
    bridged = BridgedCausalLM.from_pretrained(folder)
    assert bridged.config.base_model_name_or_path == str(dense)
    assert bridged.sparse.config.d_model == 32
    sparse = CircuitGPTForCausalLM.from_pretrained(folder / "sparse")
    weight = sparse.transformer.h[0].mlp.c_fc.weight
    assert (weight != 0).sum() == round(0.2 * weight.numel())
    assert weight.equal(bridged.sparse.transformer.h[0].mlp.c_fc.weight)
    summary = json.loads((folder / "bridge_summary.json").read_text())
    assert summary["steps"] == 10
    assert f"{summary['encode_nmse_2']:.3f}" in printed


def test_models_that_do_not_fit_are_refused(dense, corpus, tmp_path, capsys):
    out = tmp_path / "out"

    def refusal(*more):
        assert bridge(dense, corpus, out, *more) == 2
        error = capsys.readouterr().err
        assert error.count("\n") <= 2 and "Traceback" not in error  # the error, and advice
        assert not out.exists()
        return error

    assert "nowhere" in refusal("--dense-model", "nowhere")
    assert "block_size=65" in refusal("--block-size", "65")
    sparse = tmp_path / "sparse"
    tokenizer = train_tokenizer(build_corpus(corpus)["train"], vocab_size=390)
    model = CircuitGPTForCausalLM(CircuitGPTConfig(n_layer=1, d_model=16, vocab_size=390))
    model.save_pretrained(sparse)
    tokenizer.save_pretrained(sparse)
    assert "different tokenizers" in refusal("--sparse-model", str(sparse))
    assert "There is no checkpoint" in refusal("--resume-from-checkpoint", "last")
