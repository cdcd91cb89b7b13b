"""A small corpus and a saved model for every command."""

from pathlib import Path

import pytest
import torch

from hf_circuit_sparsity import (
    Circuit,
    CircuitGPTConfig,
    CircuitGPTForCausalLM,
    train_tokenizer,
)
from hf_circuit_sparsity.circuits.ablation import mean_activations
from hf_circuit_sparsity.modeling.fingerprint import model_fingerprint
from hf_circuit_sparsity.tasks.corpus import build_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A folder of Python in which quotes close as they were opened, and little else happens."""
    folder = tmp_path_factory.mktemp("corpus")
    names = ["alpha", "beta", "gamma", "delta", "omega", "sigma"]
    for number in range(12):
        lines = []
        for i in range(120):
            quote = "\"'"[(i * 7 + number) % 2]
            a, b = names[(i + number) % 6], names[(i * 5 + 1) % 6]
            lines.append(f"{a} = {quote}{b} {a}{quote} + {b}")
            lines.append(f"if {a} == {i}:\n    return True\nwhile True:\n    {b}({a}, [{i}, 2])")
        (folder / f"module_{number}.py").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """An untrained model with a tokenizer of Python, and a context too short for some tasks."""
    corpus = build_corpus()["train"].select(range(0, 700, 20))
    tokenizer = train_tokenizer(corpus, vocab_size=600)
    folder = tmp_path_factory.mktemp("model")
    config = CircuitGPTConfig(
        d_model=16, n_layer=1, d_mlp=16, block_size=64, vocab_size=len(tokenizer), n_head=2,
        d_head=8,
    )  # fmt: skip
    CircuitGPTForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def saved_circuit(saved, tmp_path) -> Path:
    """A circuit that knows no more than the task's name, in a folder beside that of its model."""
    (tmp_path / "model").symlink_to(saved)
    model = CircuitGPTForCausalLM.from_pretrained(saved)
    blocks = torch.randint(0, model.config.vocab_size, (8, 32), generator=torch.manual_seed(0))
    Circuit(
        nodes={"h.0.attn.v": [1, 2], "h.0.attn.resid_delta": [3], "h.0.mlp.post_act": [0]},
        means=mean_activations(model, blocks),
        task="while_return_true",
        model_fingerprint=model_fingerprint(model),
        model_name="runs/that/moved",
    ).save_pretrained(tmp_path / "circuit")
    return tmp_path / "circuit"
