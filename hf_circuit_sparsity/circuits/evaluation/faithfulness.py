"""Size, sufficiency and necessity of a circuit (Gao et al. 2025, section 2)."""

from torch import nn

from ...metrics.circuit_faithfulness.pair_agreement import agreement, pair_kl
from ...metrics.circuit_size.geometric_mean import shares
from ...metrics.task_loss.pair_loss import task_accuracy, task_loss
from ...tasks.binary_task import BinaryTask
from ..ablation import at_the_answer, measuring, unwrapped
from ..circuit import Circuit
from ..edges import embedding_edges, site_weights
from ..task_scores import ModelScores, all_pair_logits, model_scores


def evaluate_circuit(
    circuit: Circuit, model: nn.Module, task: BinaryTask, *, whole: ModelScores | None = None
) -> dict[str, float]:
    """Size, sufficiency and necessity of a circuit on the task's held-out prompts.

    Args:
        circuit: of `model`.
        model: the model it was cut out of.
        task: the task it was found for.
        whole: of the model on this task, from [`model_scores`]; measured if not given.

    Returns:
        `nodes`, `edges`: its size; `node_share`, `edge_share`: of the model's nodes and of its
        nonzero weights between nodes; `token_nodes`, `token_edges`: kept tokens and their nonzero
        embedding weights onto channels the circuit reads, where tokens were pruned.
        `model_loss`, `model_accuracy`: of the whole model; `calibrated_model_loss` after a scale
        and shift of its logits fitted on training prompts, as the circuit's logits have.
        `circuit_loss`, `circuit_accuracy`: with everything else mean-ablated (sufficiency);
        `uncalibrated_circuit_loss`: without scale and shift of its logits.
        `ablated_loss`, `ablated_accuracy`: with the circuit mean-ablated and everything else kept
        (necessity; ln 2 ≈ 0.69 is guessing).
        `train_circuit_loss`: sufficiency on the prompts it was found with.
        `agreement`: share of prompts on which the circuit prefers the candidate that the model
        prefers; `kl`: mean KL(model ‖ circuit) over the two candidates; both against the
        calibrated model.
        Losses are mean cross-entropy on the two candidate tokens, and KL too is in nats. All are
        computed by the functions of `hf_circuit_sparsity.metrics`.

    Raises:
        ValueError: the circuit was made for another model.
    """
    model = unwrapped(model)
    test, train = task.tensors("test"), task.tensors("train")
    with measuring(model):
        with circuit.apply(model, calibrated=False), at_the_answer(model):
            raw, raw_train = all_pair_logits(model, test), all_pair_logits(model, train)
        with circuit.apply(model, inverse=True), at_the_answer(model):
            without = all_pair_logits(model, test)
        whole = whole or model_scores(model, train, test)
    alone, alone_train = (
        circuit.calibration.pairs(pairs, rows) for pairs, rows in ((raw, test), (raw_train, train))
    )
    calibrated = whole.calibration.pairs(whole.test, test).numpy()
    nodes, edges = len(circuit), circuit.count_edges(model)
    all_nodes = sum(len(mean) for mean in circuit.means.values())
    all_edges = sum(int((m.weight != 0).sum()) for m in site_weights(model))
    node_share, edge_share = shares([nodes, edges], [all_nodes, all_edges]).tolist()
    model_pairs, alone, raw, without, alone_train = (
        pairs.numpy() for pairs in (whole.test, alone, raw, without, alone_train)
    )
    pruned_tokens = {}
    if circuit.tokens is not None:
        pruned_tokens["token_nodes"] = len(circuit.tokens)
        pruned_tokens["token_edges"] = len(embedding_edges(model, circuit.nodes, circuit.tokens))
    return {
        "nodes": nodes,
        "edges": edges,
        "node_share": node_share,
        "edge_share": edge_share,
        **pruned_tokens,
        "model_loss": task_loss(model_pairs),
        "model_accuracy": task_accuracy(model_pairs),
        "calibrated_model_loss": task_loss(calibrated),
        "circuit_loss": task_loss(alone),
        "uncalibrated_circuit_loss": task_loss(raw),
        "circuit_accuracy": task_accuracy(alone),
        "ablated_loss": task_loss(without),
        "ablated_accuracy": task_accuracy(without),
        "train_circuit_loss": task_loss(alone_train),
        "agreement": agreement(alone, calibrated),
        "kl": pair_kl(alone, calibrated),
    }
