"""One small artifact of each kind, to write cards about."""

from dataclasses import replace

import torch

from hf_circuit_sparsity import BridgedCausalLM, Circuit
from hf_circuit_sparsity.circuits.evaluation.faithfulness import evaluate_circuit
from hf_circuit_sparsity.modeling.configuration_circuitgpt import CircuitGPTConfig
from tests.circuits import planted
from tests.circuits.planted import on_off_task, planted_model

SUMMARY = {
    "parameters": 3000, "loss": 3.25, "perplexity": 25.79, "density": 0.05, "nonzeros": 150,
    "steps": 10, "tokens": 1280, "train_seconds": 90.0, "model": "runs/x",
}  # fmt: skip
BRIDGE_SUMMARY = {
    "lm": 3.5, "kl": 0.25, "nmse": 0.5, "dense_to_sparse": 0.3, "sparse_to_dense": 0.4,
    **{f"{name}_{i}": 0.125 for i in range(5) for name in (
        "encode_nmse", "decode_nmse", "dense_to_sparse_kl", "sparse_to_dense_kl"
    )},
}  # fmt: skip


def planted_circuit(model=None, **fields) -> Circuit:
    """The circuit of the planted model, measured on its task."""
    model = model or planted_model()
    config = {"target_loss": 0.15, "seed": 0}
    circuit = planted.planted_circuit(model, model_name="ada/planted", config=config)
    circuit.metrics = evaluate_circuit(circuit, model, on_off_task())
    return replace(circuit, **fields)


def bridge() -> BridgedCausalLM:
    """A bridge from the planted model to a narrow sparse model."""
    torch.manual_seed(0)
    dense = planted_model()
    dense.config.name_or_path = "ada/planted"
    sparse = CircuitGPTConfig(
        n_layer=2, n_head=2, d_head=4, d_model=8, d_mlp=16, block_size=16, vocab_size=16
    )
    return BridgedCausalLM.from_models(dense, sparse)
