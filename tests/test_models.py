"""The models in the repository load without a network and do what models/README.md says."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from hf_circuit_sparsity.circuits.task_scores import evaluate_tasks
from hf_circuit_sparsity.modeling.modeling_circuitgpt import CircuitGPTForCausalLM
from hf_circuit_sparsity.modeling.sparse_layers import sparse_layers

FOLDER = Path(__file__).parents[1] / "models"


@pytest.mark.parametrize(
    ("name", "nonzeros"), [("python-1024", 1_643_648), ("python-512", 231_712)]
)
def test_it_answers_a_task_and_has_few_weights(name, nonzeros):
    folder = FOLDER / name
    model = CircuitGPTForCausalLM.from_pretrained(folder, dtype=torch.float32, sparse=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    layers = sparse_layers(model)
    assert sum(layer.csr.values.numel() for layer in layers.values()) <= nonzeros
    (score,) = evaluate_tasks(
        model, tokenizer, names=["while_return_true"], n_train=32, n_test=32, progress=False
    )
    assert score.accuracy > 0.95
