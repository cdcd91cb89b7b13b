"""`hf-circuit-sparsity view` as a person calls it, on a small model of its own."""

import json
from pathlib import Path

import pytest
import torch

from hf_circuit_sparsity.circuits.ablation import mean_activations
from hf_circuit_sparsity.circuits.circuit import Circuit
from hf_circuit_sparsity.cli import main
from hf_circuit_sparsity.modeling.configuration_circuitgpt import CircuitGPTConfig
from hf_circuit_sparsity.modeling.fingerprint import model_fingerprint
from hf_circuit_sparsity.tasks.corpus import build_corpus
from hf_circuit_sparsity.tasks.packing import pack_dataset
from hf_circuit_sparsity.tasks.tokenizer import train_tokenizer
from tests.conftest import random_model


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A folder with `corpus`, `model` and a `circuit` that knows no more than the task's name."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "corpus").mkdir()
    for number in range(4):
        lines = [f"name_{i} = {quote}a b{i}{quote}" for i in range(99) for quote in "'\""]
        (folder / "corpus" / f"m{number}.py").write_text("\n".join(lines))
    corpus = build_corpus(folder / "corpus")
    tokenizer = train_tokenizer(corpus["train"], vocab_size=300)
    config = CircuitGPTConfig(
        n_layer=1, d_model=16, d_head=8, d_mlp=16, block_size=160, vocab_size=len(tokenizer)
    )
    model = random_model(config)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    blocks = torch.tensor(pack_dataset(corpus["train"], tokenizer, 32)["input_ids"][:8])
    Circuit(
        nodes={"h.0.attn.v": [1, 2], "h.0.attn.resid_delta": [3], "h.0.mlp.post_act": [0]},
        means=mean_activations(model, blocks),
        task="single_double_quote",
        model_fingerprint=model_fingerprint(model),
        model_name="runs/that/moved",
    ).save_pretrained(folder / "circuit")
    return folder


def test_the_page_is_written_beside_the_circuit(run, capsys):
    assert main(["view", str(run / "circuit"), "--corpus", str(run / "corpus")]) == 0
    page = run / "circuit" / "index.html"
    printed = capsys.readouterr().out
    assert str(page) in printed and "kB" in printed
    text = page.read_text(encoding="utf-8")
    data = text.split('id="data">', 1)[1].split("</script>", 1)[0]
    shown = json.loads(data)
    assert shown["task"] == "single_double_quote" and shown["size"]["nodes"] == 4
    assert shown["ranking"] == "ablation effect"  # this circuit has no mask scores
    assert sorted(p.name for p in page.parent.iterdir()) == [
        "circuit.json", "circuit.safetensors", "index.html",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere"),
        (["{run}/circuit", "--model", "nowhere"], "'nowhere' is neither a folder"),
        (["{run}/circuit", "--corpus", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(run, arguments, message, tmp_path, capsys):
    filled = [argument.format(run=run) for argument in arguments]
    assert main(["view", *filled, "--output-dir", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not list(tmp_path.iterdir())
