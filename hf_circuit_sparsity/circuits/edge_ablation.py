"""Cutting single weights between two nodes of a circuit.

A weight that is cut no longer carries what its source does, only what the source does on average:
its part of the target's input is fixed at weight × mean. What a node reads from outside the circuit
is treated the same way, so a node all of whose outgoing weights are cut may as well be left out.
"""

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import nn

from .ablation import ReferenceMeans
from .edges import Edge, site_linears

EdgeName = tuple[str, int, str, int]
"""Source site, index there, target site, index there."""
Offsets = dict[str, dict[int, float]]


def edge_name(edge: Edge) -> EdgeName:
    """An edge without its weight."""
    return (edge.source_site, edge.source, edge.target_site, edge.target)


def cut_offsets(cut: Collection[Edge], means: ReferenceMeans) -> Offsets:
    """What cut edges add to their targets' inputs on average: target site → index → sum.

    Values reach the output projection through attention, so there the mean is that of what
    attention makes of them.
    """
    offsets: Offsets = {}
    for edge in cut:
        source = means.attended if edge.source_site.endswith(".v") else means.nodes
        at = offsets.setdefault(edge.target_site, {})
        part = edge.weight * source[edge.source_site][edge.source].item()
        at[edge.target] = at.get(edge.target, 0.0) + part
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
        start = {site: rows.start for site, rows in targets}
        here = [e for e in cut if e.source_site == source_site and e.target_site in start]
        added = [
            (start[site] + index, value)
            for site in start
            for index, value in offsets.get(site, {}).items()
        ]
        if not here and not added:
            continue
        written = sorted({start[e.target_site] + e.target for e in here} | {r for r, _ in added})
        read = sorted({e.source for e in here})
        place = {row: i for i, row in enumerate(written)}
        weights = torch.zeros(len(written), len(read))
        for e in here:
            weights[place[start[e.target_site] + e.target], read.index(e.source)] = e.weight
        constant = torch.zeros(len(written))
        for row, value in added:
            constant[place[row]] += value
        hooks.append(
            (linear, _without(torch.tensor(written), torch.tensor(read), weights, constant))
        )
    return hooks


def _without(
    written: torch.Tensor, read: torch.Tensor, weights: torch.Tensor, constant: torch.Tensor
) -> Callable:
    def hook(module, args, output):
        change = constant.to(output)
        if len(read):
            seen = args[0][..., read.to(output.device)]
            change = change - seen @ weights.T.to(output)
        change = change.expand(*output.shape[:-1], len(written))
        return output.index_add(-1, written.to(output.device), change)

    return hook
