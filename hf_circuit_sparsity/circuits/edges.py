"""Edges of a circuit: the nonzero weights between two of its nodes (Gao et al. 2025, section 2).

A weight that is cut no longer carries what its source does, only what the source does on average:
its part of the target's input is fixed at weight × mean. What a node reads from outside the circuit
is treated the same way, so a node all of whose outgoing weights are cut may as well be left out.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn

from .ablation import ReferenceMeans

EdgeName = tuple[str, int, str, int]
"""Source site, index there, target site, index there."""
Offsets = dict[str, dict[int, float]]


class Edge(NamedTuple):
    """One nonzero weight between two nodes."""

    source_site: str
    """Site of the node the weight reads, e.g. `h.0.attn.act_in`."""
    source: int
    """Its index there."""
    target_site: str
    """Site of the node the weight writes to."""
    target: int
    """Its index there."""
    weight: float

    @property
    def name(self) -> "EdgeName":
        """The edge without its weight."""
        return self[:4]


def site_linears(model: nn.Module) -> list[tuple[nn.Module, str, list[tuple[str, slice]]]]:
    """Every linear layer between node sites: the layer, the site it reads, and the sites it writes
    to, each with its rows of the layer's output."""
    transformer = getattr(model, "transformer", model)
    linears = []
    for i, block in enumerate(transformer.h):
        attn, mlp = f"h.{i}.attn", f"h.{i}.mlp"
        inner = block.attn.v.width
        parts = [(f"{attn}.{p}", slice(n * inner, (n + 1) * inner)) for n, p in enumerate("qkv")]
        linears += [
            (block.attn.c_attn, f"{attn}.act_in", parts),
            # Attention mixes positions, not channels: what c_proj reads on a channel is v's.
            (block.attn.c_proj, f"{attn}.v", [(f"{attn}.resid_delta", slice(0, None))]),
            (block.mlp.c_fc, f"{mlp}.act_in", [(f"{mlp}.post_act", slice(0, None))]),
            (block.mlp.c_proj, f"{mlp}.post_act", [(f"{mlp}.resid_delta", slice(0, None))]),
        ]
    return linears


def site_weights(model: nn.Module) -> list[tuple[str, str, torch.Tensor]]:
    """Every weight matrix between two node sites: source site, target site, `(target, source)`."""
    matrices = []
    for linear, source, targets in site_linears(model):
        weight = linear.weight  # a sparse layer makes it anew each time
        matrices += [(source, target, weight[rows]) for target, rows in targets]
    return matrices


def circuit_edges(model: nn.Module, nodes: Mapping[str, Sequence[int]]) -> list[Edge]:
    """The nonzero weights of `model` whose both ends are in `nodes` (site → indices)."""
    edges = []
    for source_site, target_site, weight in site_weights(model):
        sources, targets = nodes.get(source_site, ()), nodes.get(target_site, ())
        if not sources or not targets:
            continue
        block = weight.detach()[list(targets)][:, list(sources)].float().cpu()
        for t, s in block.nonzero().tolist():
            edges.append(Edge(source_site, sources[s], target_site, targets[t], block[t, s].item()))
    return edges


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

    Values reach the output projection through attention, so there the mean is that of what
    attention makes of them.
    """
    offsets: Offsets = {}
    for edge in cut:
        source = means.attended if edge.source_site.endswith(".v") else means.nodes
        sums = offsets.setdefault(edge.target_site, {})
        part = edge.weight * source[edge.source_site][edge.source].item()
        sums[edge.target] = sums.get(edge.target, 0.0) + part
    return offsets


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
    for linear, source_site, targets in site_linears(model):
        first = {site: rows.start for site, rows in targets}
        edges = [e for e in cut if e.source_site == source_site and e.target_site in first]
        added = {
            first[site] + index: value
            for site in first
            for index, value in offsets.get(site, {}).items()
        }
        if not edges and not added:
            continue
        rows = [first[e.target_site] + e.target for e in edges] + list(added)
        written, row_of = torch.tensor(rows).unique(return_inverse=True)
        columns = torch.tensor([e.source for e in edges], dtype=torch.long)
        read, column_of = columns.unique(return_inverse=True)
        weights = torch.zeros(len(written), len(read))
        weights[row_of[: len(edges)], column_of] = torch.tensor([e.weight for e in edges])
        constant = torch.zeros(len(written))
        constant[row_of[len(edges) :]] = torch.tensor(list(added.values()))
        hooks.append((linear, _without(written, read, weights, constant)))
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
