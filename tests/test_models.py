"""The model in the repository loads without a network and does what models/README.md says."""

from pathlib import Path

import torch
from transformers import AutoTokenizer

from hf_circuit_sparsity.circuits.task_scores import evaluate_tasks
from hf_circuit_sparsity.modeling.modeling_circuitgpt import CircuitGPTForCausalLM
from hf_circuit_sparsity.modeling.sparse_layers import sparse_layers

FOLDER = Path(__file__).parents[1] / "models" / "python-1024"


def test_it_answers_a_task_and_has_few_weights():
    model = CircuitGPTForCausalLM.from_pretrained(FOLDER, dtype=torch.float32, sparse=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    layers = sparse_layers(model)
    assert sum(layer.csr.values.numel() for layer in layers.values()) < 1_643_648 + 1
    (score,) = evaluate_tasks(
        model, tokenizer, names=["while_return_true"], n_train=32, n_test=32, progress=False
    )
    assert score.accuracy > 0.95
