"""Edges of a circuit: the nonzero weights between two of its nodes (Gao et al. 2025, section 2).

A weight that is cut no longer carries what its source does, only what the source does on average:
its part of the target's input is fixed at weight × mean. What a node reads from outside the circuit
is treated the same way, so a node all of whose outgoing weights are cut may as well be left out.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..decoders.decoder import decoder_of
from ..decoders.layer import Projection, Target
from .ablation import ReferenceMeans

EdgeName = tuple[str, int, str, int]
"""Source site, index there, target site, index there."""
Offsets = dict[str, dict[int, float]]


class Edge(NamedTuple):
    """One nonzero weight between two nodes.

    Two nodes may have several: one into a gated neuron and one into its gate; one for each query
    head that reads a shared value channel. They have one name, and are kept or cut together.
    """

    source_site: str
    """Site of the node the weight reads, e.g. `h.0.attn.act_in`."""
    source: int
    """Its index there."""
    target_site: str
    """Site of the node the weight writes to."""
    target: int
    """Its index there."""
    weight: float
    column: int
    """The layer's input that carries the source: its index, but for shared value channels."""
    gate: bool = False
    """Whether the weight writes to the target's gate."""

    @property
    def name(self) -> "EdgeName":
        """The edge without its weight."""
        return self[:4]


class SiteWeights(NamedTuple):
    """A weight matrix between two node sites."""

    projection: Projection
    target: Target
    weight: Tensor
    """`(nodes of the target, inputs of the layer)`."""

    def columns_of(self, nodes: Sequence[int]) -> tuple[list[int], list[int]]:
        """The inputs of the layer that carry these nodes of the source, and the node of each."""
        if self.projection.columns is None:
            return list(nodes), list(nodes)
        carried, chosen = self.projection.columns.tolist(), set(nodes)
        columns = [c for c, node in enumerate(carried) if node in chosen]
        return columns, [carried[c] for c in columns]


def site_weights(model: nn.Module) -> list[SiteWeights]:
    """Every weight matrix between two node sites."""
    matrices = []
    for projection in decoder_of(model).projections():
        weight = projection.weight()
        matrices += [
            SiteWeights(projection, t, weight if t.rows is None else weight[t.rows])
            for t in projection.targets
        ]
    return matrices


def circuit_edges(model: nn.Module, nodes: Mapping[str, Sequence[int]]) -> list[Edge]:
    """The nonzero weights of `model` whose both ends are in `nodes` (site → indices)."""
    edges = []
    for matrix, targets, columns, sources, block in _blocks(model, nodes):
        source, target, gate = matrix.projection.source, matrix.target.site, matrix.target.gate
        block = block.float().cpu()
        places = block.nonzero()
        weights = block[places[:, 0], places[:, 1]].tolist()
        for (t, s), weight in zip(places.tolist(), weights, strict=True):
            edges.append(Edge(source, sources[s], target, targets[t], weight, columns[s], gate))
    return edges


def count_edges(model: nn.Module, nodes: Mapping[str, Sequence[int]]) -> int:
    """How many [`circuit_edges`] there are; a circuit of a dense model may have millions."""
    return sum(int(block.count_nonzero()) for *_, block in _blocks(model, nodes))


def _blocks(
    model: nn.Module, nodes: Mapping[str, Sequence[int]]
) -> Iterator[tuple[SiteWeights, list[int], list[int], list[int], Tensor]]:
    """The part of each matrix between nodes: its rows' nodes, its columns, theirs, its weights."""
    for matrix in site_weights(model):
        targets = list(nodes.get(matrix.target.site, ()))
        columns, sources = matrix.columns_of(nodes.get(matrix.projection.source, ()))
        if sources and targets:
            yield matrix, targets, columns, sources, matrix.weight.detach()[targets][:, columns]


def embedding_edges(
    model: nn.Module, nodes: Mapping[str, Sequence[int]], token_ids: Sequence[int]
) -> list[tuple[int, int, float]]:
    """Nonzero embedding entries of these tokens on the channels the circuit reads.

    Returns:
        Triples of token id, residual channel, weight.
    """
    return _nonzeros(model.get_input_embeddings(), nodes, "act_in", token_ids)


def unembedding_edges(
    model: nn.Module, nodes: Mapping[str, Sequence[int]], token_ids: Sequence[int]
) -> list[tuple[int, int, float]]:
    """Nonzero unembedding entries of these tokens on the channels the circuit writes to.

    Returns:
        Triples of residual channel, token id, weight.
    """
    edges = _nonzeros(model.get_output_embeddings(), nodes, "resid_delta", token_ids)
    return sorted((channel, token, weight) for token, channel, weight in edges)


def _nonzeros(
    table: nn.Module, nodes: Mapping[str, Sequence[int]], ending: str, token_ids: Sequence[int]
) -> list[tuple[int, int, float]]:
    """Token id, channel and weight of a table's nonzeros on the channels of some sites' nodes."""
    channels = {c for site, ids in nodes.items() if site.endswith(ending) for c in ids}
    tokens, width = sorted(set(token_ids)), table.weight.shape[1]
    columns = sorted(c for c in channels if c < width)  # past it are concatenated positions
    block = table.weight.detach()[tokens][:, columns].cpu()
    return [(tokens[t], columns[c], block[t, c].item()) for t, c in block.nonzero().tolist()]


def cut_offsets(cut: Collection[Edge], means: ReferenceMeans) -> Offsets:
    """What cut edges add to their targets' inputs on average: target site → index → sum.

    Sums for gates are under the site's name and `.gate`. Values reach the output projection through
    attention, so there the mean is that of what attention makes of them.
    """
    offsets: Offsets = {}
    for edge in cut:
        source = means.attended if edge.source_site.endswith(".v") else means.nodes
        sums = offsets.setdefault(_written(edge.target_site, edge.gate), {})
        part = edge.weight * source[edge.source_site][edge.column].item()
        sums[edge.target] = sums.get(edge.target, 0.0) + part
    return offsets


def _written(site: str, gate: bool) -> str:
    return f"{site}.gate" if gate else site


def edge_hooks(
    model: nn.Module, cut: Sequence[Edge], offsets: Mapping[str, Mapping[int, float]]
) -> list[tuple[nn.Module, Callable]]:
    """Forward hooks on linear layers, without the cut edges and with their offsets.

    Args:
        model: the edges' model.
        cut: edges to leave out.
        offsets: from [`cut_offsets`]; entries of edges that are not in `cut` count as well.
    """
    hooks = []
    for projection in decoder_of(model).projections():
        targets = {(t.site, t.gate): t.rows for t in projection.targets}
        edges = [
            edge
            for edge in cut
            if edge.source_site == projection.source and (edge.target_site, edge.gate) in targets
        ]
        added = [
            (target, index, value)
            for target in targets
            for index, value in offsets.get(_written(*target), {}).items()
        ]
        if not edges and not added:
            continue
        outputs = [((e.target_site, e.gate), e.target) for e in edges] + [a[:2] for a in added]
        # Target and node → the layer's output.
        rows = {target: r if r is None else r.tolist() for target, r in targets.items()}
        outputs = [i if rows[target] is None else rows[target][i] for target, i in outputs]
        written, row_of = torch.tensor(outputs).unique(return_inverse=True)
        columns = torch.tensor([e.column for e in edges], dtype=torch.long)
        read, column_of = columns.unique(return_inverse=True)
        weights = torch.zeros(len(written), len(read))
        weights[row_of[: len(edges)], column_of] = torch.tensor([e.weight for e in edges])
        constant = torch.zeros(len(written))
        constant[row_of[len(edges) :]] = torch.tensor([value for *_, value in added])
        hooks.append((projection.module, _without(written, read, weights, constant)))
    return hooks


def _without(
    written: torch.Tensor, read: torch.Tensor, weights: torch.Tensor, constant: torch.Tensor
) -> Callable:
    """A hook that adds `constant - weights @ input[read]` to the outputs `written`."""

    def hook(module, args, output):
        inputs = args[0][..., read.to(output.device)]
        change = constant.to(output) - inputs @ weights.T.to(output)
        return output.index_add(-1, written.to(output.device), change)

    return hook
