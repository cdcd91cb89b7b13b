"""What a page shows of a circuit's parts: their effects, smaller circuits, attention, channels."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ...decoders.decoder import decoder_of
from ..ablation import TOKENS, ReferenceMeans, at_the_answer, hooked
from ..circuit import Circuit
from ..collapse import kept_alone
from ..edges import Edge, EdgeName, cut_offsets, edge_hooks
from ..task_scores import TaskTensors, all_pair_logits, binary_loss
from .layout import Key

TOKENS_SHOWN = 10


def before_and_after(
    circuit: Circuit, model: nn.Module, tensors: TaskTensors
) -> dict[str, torch.Tensor]:
    """Logits `(n, 2)` of the answers that the whole `model`, the `circuit` alone and the model
    `without` it give; of the first two calibrated alike."""
    runs = {"model": circuit.calibration.pairs(all_pair_logits(model, tensors), tensors)}
    with circuit.apply(model, collapsed=True), at_the_answer(model):
        runs["circuit"] = all_pair_logits(model, tensors)
    with circuit.apply(model, inverse=True), at_the_answer(model):
        runs["without"] = all_pair_logits(model, tensors)
    return runs


def edge_effects(
    circuit: Circuit,
    model: nn.Module,
    tensors: TaskTensors,
    edges: Iterable[Edge],
    attended: Mapping[str, torch.Tensor],
    wrap: Callable[[Iterable], Iterable] = iter,
) -> dict[EdgeName, float]:
    """By how much the circuit's task loss rises, in nats, when a weight of it is cut too.

    What its source adds to its target is then the same at every token: weight × the source's mean.

    Args:
        circuit: of `model`; its own cuts and calibration stay.
        model: the model.
        tensors: prompts to measure on.
        edges: those to measure; the weights of one name are cut together.
        attended: [`ReferenceMeans.attended`], for the edges of values.
        wrap: put around the edges, e.g. a progress bar.
    """
    named: dict[EdgeName, list[Edge]] = {}
    for edge in edges:
        named.setdefault(edge.name, []).append(edge)
    means = ReferenceMeans(circuit.means, dict(attended), torch.empty(0))
    effects = {}
    with circuit.apply(model, collapsed=True), at_the_answer(model):
        whole = binary_loss(all_pair_logits(model, tensors)).item()
        for name in wrap(named):
            with hooked(edge_hooks(model, named[name], cut_offsets(named[name], means))):
                effects[name] = binary_loss(all_pair_logits(model, tensors)).item() - whole
    return effects


def by_score(circuit: Circuit, nodes: Iterable[Key]) -> list[Key]:
    """Nodes of the model, highest mask score first; as they come where none was learned."""
    scores = {site: score.tolist() for site, score in circuit.scores.items()}
    if not scores:
        return list(nodes)
    return sorted(nodes, key=lambda node: scores[node[0]][node[1]], reverse=True)


def other_nodes(circuit: Circuit) -> list[Key]:
    """The model's nodes outside the circuit, highest mask score first; in order without scores."""
    outside = {site: (~mask).nonzero()[:, 0].tolist() for site, mask in circuit.masks().items()}
    return by_score(circuit, [(site, index) for site, ids in outside.items() for index in ids])


def curve_sizes(circuit_size: int, model_size: int, inside: int = 25, beyond: int = 5) -> list[int]:
    """Sizes to measure: evenly up to the circuit's, then in even ratios up to the whole model."""
    small = torch.linspace(0, circuit_size, min(circuit_size + 1, inside)).round().long().tolist()
    ratio = (model_size / max(1, circuit_size)) ** (1 / beyond)
    large = [round(circuit_size * ratio**step) for step in range(1, beyond + 1)]
    return sorted({*small, *(size for size in large if circuit_size < size <= model_size)})


def nested_losses(
    circuit: Circuit,
    model: nn.Module,
    order: Sequence[Key],
    sizes: Iterable[int],
    test: TaskTensors,
    collapsed: bool = True,
) -> list[float]:
    """Task loss in nats of the first `size` nodes of `order` alone, for every size.

    The calibration is the circuit's. Weights and tokens that the circuit does without are cut up to
    its own size, and not beyond.

    Args:
        circuit: of `model`.
        model: the model.
        order: its nodes, those that are kept longest first.
        sizes: how many of them are kept.
        test: prompts to measure on.
        collapsed: compute no more than the kept nodes need; if not, hooks alone ablate, which is
            slower and the reference.
    """
    own, means = circuit.masks_and_means(model)
    cuts = circuit.edge_cuts(model)
    losses = []
    for size in sizes:
        within = size <= len(circuit)
        masks = {s: torch.zeros_like(mask) for s, mask in own.items() if s != TOKENS}
        for site, index in order[:size]:
            masks[site][index] = True
        if within and TOKENS in own:
            masks[TOKENS] = own[TOKENS]
        alone = kept_alone(model, masks, means, collapsed)
        with alone, hooked(cuts if within else []), at_the_answer(model):
            pairs = circuit.calibration.pairs(all_pair_logits(model, test), test)
        losses.append(binary_loss(pairs).item())
    return losses


def channel_embeddings(
    model: nn.Module, nodes: Mapping[str, Sequence[int]]
) -> list[dict[str, Any]]:
    """Embedding, position and unembedding weights of every residual channel of a circuit.

    Args:
        model: of an architecture that is described, see `docs/decoders.md`.
        nodes: site → indices, of the circuit.

    Returns:
        One entry per channel: `channel`; `reads` and `writes`, the sites with a node on it; and,
        each only if not all zero, `embed` and `unembed` (`positive` and `negative`: pairs of a
        token id and its weight, strongest first; `nonzeros`, of how many tokens) and `position`
        (a weight per position).
    """
    reads: dict[int, list[str]] = {}
    writes: dict[int, list[str]] = {}
    for site, ids in nodes.items():
        for sites, ending in ((reads, "act_in"), (writes, "resid_delta")):
            if site.endswith(ending):
                for channel in ids:
                    sites.setdefault(channel, []).append(site)
    embedding = model.get_input_embeddings().weight.detach().float().cpu()
    unembedding = model.get_output_embeddings().weight.detach().float().cpu()
    positions = decoder_of(model).positions
    positions = None if positions is None else positions.detach().float().cpu()
    width = embedding.shape[1]
    # Where positions are concatenated, the channels after the residual ones are theirs.
    first_position = width if getattr(model.config, "d_pos_emb", None) else 0
    channels = []
    for channel in sorted({*reads, *writes}):
        entry: dict[str, Any] = {
            "channel": channel,
            "reads": reads.get(channel, []),
            "writes": writes.get(channel, []),
        }
        if channel < width:
            entry["embed"] = _strongest(embedding[:, channel])
            entry["unembed"] = _strongest(unembedding[:, channel])
        if positions is not None and 0 <= channel - first_position < positions.shape[1]:
            column = positions[:, channel - first_position]
            entry["position"] = column.tolist() if column.any() else None
        channels.append({name: value for name, value in entry.items() if value is not None})
    return channels


def _strongest(column: torch.Tensor) -> dict[str, Any] | None:
    if not column.any():
        return None
    order = column.argsort(descending=True, stable=True).tolist()

    def pairs(tokens: list[int], sign: int) -> list[tuple[int, float]]:
        strongest = [(token, column[token].item()) for token in tokens[:TOKENS_SHOWN]]
        return [(token, weight) for token, weight in strongest if sign * weight > 0]

    return {
        "positive": pairs(order, 1),
        "negative": pairs(order[::-1], -1),
        "nonzeros": int((column != 0).sum()),
        "tokens": len(column),
    }
