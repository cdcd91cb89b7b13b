"""What a circuit's nodes are worth: ablation effects, and the loss of smaller circuits."""

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from ..ablation import ablation_hook, hooked_sites, mean_ablated
from ..task_loss import TaskTensors, all_pair_logits, binary_accuracy, binary_loss, fit_calibration

if TYPE_CHECKING:
    from ..circuit import Circuit

NodeKey = tuple[str, int]


class LossAndAccuracy(NamedTuple):
    """Mean cross-entropy on the two candidates in nats, and the share of right answers."""

    loss: float
    accuracy: float


def before_and_after(
    circuit: "Circuit", model: nn.Module, tensors: TaskTensors
) -> dict[str, LossAndAccuracy]:
    """Loss of the whole `model`, of the `circuit` alone, and of the model `without` it."""
    runs = {"model": all_pair_logits(model, tensors)}
    with circuit.apply(model):
        runs["circuit"] = all_pair_logits(model, tensors)
    with circuit.apply(model, inverse=True):
        runs["without"] = all_pair_logits(model, tensors)
    return {
        name: LossAndAccuracy(binary_loss(pairs).item(), binary_accuracy(pairs))
        for name, pairs in runs.items()
    }


def node_effects(
    circuit: "Circuit", model: nn.Module, tensors: TaskTensors, nodes: Iterable[NodeKey]
) -> dict[NodeKey, float]:
    """By how much the circuit's task loss rises, in nats, when a node of it is mean-ablated too.

    Each node is ablated alone, the calibration stays the circuit's.

    Args:
        nodes: those of the circuit to measure; a progress bar may be wrapped around them.
    """
    effects = {}
    with circuit.apply(model):
        whole = binary_loss(all_pair_logits(model, tensors)).item()
        for site, index in nodes:
            mean = circuit.means[site]
            keep = torch.arange(len(mean)) != index
            with hooked_sites(model, {site: ablation_hook(keep, mean)}):
                effects[site, index] = binary_loss(all_pair_logits(model, tensors)).item() - whole
    return effects


def ranked_nodes(circuit: "Circuit", effects: dict[NodeKey, float]) -> list[NodeKey]:
    """The circuit's nodes, highest mask score first; by ablation effect where none was learned."""

    def worth(node: NodeKey) -> float:
        site, index = node
        return circuit.scores[site][index].item() if circuit.scores else effects[node]

    return sorted(effects, key=worth, reverse=True)


def other_nodes(circuit: "Circuit") -> list[NodeKey]:
    """The model's nodes outside the circuit, highest mask score first; in order without scores."""
    masks = circuit.masks()
    others = [
        (site, index) for site, mask in masks.items() for index in (~mask).nonzero()[:, 0].tolist()
    ]
    if circuit.scores:
        scores = {site: score.tolist() for site, score in circuit.scores.items()}
        others.sort(key=lambda node: scores[node[0]][node[1]], reverse=True)
    return others


def curve_sizes(circuit_size: int, model_size: int, inside: int = 25, beyond: int = 8) -> list[int]:
    """Sizes to measure: evenly up to the circuit's, then in even ratios up to the whole model."""
    small = torch.linspace(0, circuit_size, min(circuit_size + 1, inside)).round().long().tolist()
    ratio = (model_size / max(1, circuit_size)) ** (1 / beyond)
    large = [round(circuit_size * ratio**step) for step in range(1, beyond + 1)]
    return sorted({*small, *(size for size in large if circuit_size < size <= model_size)})


def nested_losses(
    circuit: "Circuit",
    model: nn.Module,
    order: Sequence[NodeKey],
    sizes: Iterable[int],
    train: TaskTensors,
    test: TaskTensors,
) -> list[float]:
    """Task loss in nats of the first `size` nodes of `order` alone, for every size.

    As in the search for a circuit, every size has a scale and shift of its logits fitted, on
    `train`; the loss is on `test`. Weights and tokens that the circuit does without are cut up to
    its own size, and not beyond.
    """
    losses = []
    for size in sizes:
        masks = {site: torch.zeros_like(mask) for site, mask in circuit.masks().items()}
        for site, index in order[:size]:
            masks[site][index] = True
        within = size <= len(circuit)
        cuts = circuit.apply(model, calibrated=False) if within else nullcontext()
        with cuts, mean_ablated(model, masks, circuit.means):
            fitted = fit_calibration(all_pair_logits(model, train), train)
            pairs = all_pair_logits(model, test)
        losses.append(binary_loss(fitted.pairs(pairs, test)).item())
    return losses
