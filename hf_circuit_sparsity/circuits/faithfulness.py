"""Checks a circuit must pass (METHOD section 2)."""

from typing import Any

from torch import nn

from .circuit import Circuit
from .edges import site_weights
from .task_loss import all_pair_logits, binary_accuracy, binary_loss, fit_calibration


def evaluate_circuit(circuit: Circuit, model: nn.Module, task: Any) -> dict[str, float]:
    """Size, sufficiency and necessity of a circuit on the task's held-out prompts.

    Returns:
        `nodes`, `edges`: its size; `node_share`, `edge_share`: of the model's nodes and of its
        nonzero weights between nodes.
        `model_loss`, `model_accuracy`: of the whole model; `calibrated_model_loss` after a scale
        and shift of its logits fitted on training prompts, as the circuit's logits have.
        `circuit_loss`, `circuit_accuracy`: with everything else mean-ablated (sufficiency).
        `ablated_loss`, `ablated_accuracy`: with the circuit mean-ablated and everything else kept
        (necessity; ln 2 ≈ 0.69 is guessing).
        `train_circuit_loss`: sufficiency on the prompts it was found with.
        Losses are mean cross-entropy on the two candidate tokens, in nats.
    """
    model.eval()
    test, train = task.tensors("test"), task.tensors("train")
    whole = all_pair_logits(model, test)
    calibration = fit_calibration(all_pair_logits(model, train), train)
    with circuit.apply(model):
        alone, alone_train = all_pair_logits(model, test), all_pair_logits(model, train)
    with circuit.apply(model, inverse=True):
        without = all_pair_logits(model, test)
    nodes = sum(len(mean) for mean in circuit.means.values())
    weights = sum(int((weight != 0).sum()) for _, _, weight in site_weights(model))
    edges = len(circuit.edges(model))
    return {
        "nodes": len(circuit),
        "edges": edges,
        "node_share": len(circuit) / nodes,
        "edge_share": edges / max(1, weights),
        "model_loss": binary_loss(whole).item(),
        "model_accuracy": binary_accuracy(whole),
        "calibrated_model_loss": binary_loss(calibration.pairs(whole, test)).item(),
        "circuit_loss": binary_loss(alone).item(),
        "circuit_accuracy": binary_accuracy(alone),
        "ablated_loss": binary_loss(without).item(),
        "ablated_accuracy": binary_accuracy(without),
        "train_circuit_loss": binary_loss(alone_train).item(),
    }
