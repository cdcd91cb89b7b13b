"""From learned masks to the smallest circuit: bisect, then drop what is not needed."""

from collections.abc import Collection, Sequence

import torch
from torch import nn

from ..ablation import TOKENS
from ..edges import Edge, circuit_edges, site_weights
from .masks import Masks
from .selector import Selector

# Circuits of more nodes are thinned out by estimates first.
_FEW_NODES = 24


def bisect(scores: Masks, selector: Selector, allowed: Masks | None = None) -> Masks:
    """The fewest nodes, in order of their scores, that reach the target loss.

    Args:
        scores: the learned mask parameters.
        selector: measures.
        allowed: nodes that may be kept, all if not given; all of them reach the target.
    """
    flat = torch.cat(list(scores.values()))
    may = torch.ones_like(flat, dtype=torch.bool)
    if allowed is not None:
        may = torch.cat([allowed[site].to(flat.device) for site in scores])
    order = flat.where(may, -torch.inf).argsort(descending=True, stable=True)

    def best(k: int) -> Masks:
        mask = torch.zeros(len(flat), dtype=torch.bool, device=flat.device)
        mask[order[:k]] = True
        parts = mask.split([len(score) for score in scores.values()])
        return dict(zip(scores, parts, strict=True))

    def fewest(high: int) -> int:
        low = 0  # the target is reached at high, not at low
        while high - low > 1:
            middle = (low + high) // 2
            if selector.reaches(best(middle)):
                high = middle
            else:
                low = middle
        return high

    k = fewest(int(may.sum()))
    # The loss may rise again with nodes that the masks had closed, and bisection then stops above
    # them; the nodes left open are the ones that the masks were trained with.
    opened = int(((flat > 0) & may).sum())
    if 0 < opened < k and selector.reaches(best(opened)):
        k = fewest(opened)
    return best(k)


def drop_unconnected(
    model: nn.Module, keep: Masks, selector: Selector, cut: Sequence[Edge] = ()
) -> Masks:
    """Drop kept nodes that no kept node reads or writes, where that does not cost the target.

    Queries and keys need no reader: the attention scores read them.
    """
    gone: dict[tuple[str, str, bool], list[Edge]] = {}
    for edge in cut:
        gone.setdefault((edge.source_site, edge.target_site, edge.gate), []).append(edge)
    matrices = []
    for projection, target, weight in site_weights(model):
        nonzero = weight != 0
        for edge in gone.get((projection.source, target.site, target.gate), ()):
            nonzero[edge.target, edge.column] = False
        if projection.columns is not None:
            nodes = torch.zeros(len(nonzero), len(keep[projection.source]), device=nonzero.device)
            columns = projection.columns.to(nonzero.device)
            nonzero = nodes.index_add_(1, columns, nonzero.float()) > 0
        matrices.append((projection.source, target.site, nonzero))
    connected = {site: mask.clone() for site, mask in keep.items()}
    changed = True
    while changed:
        changed = False
        reads = {site: torch.zeros_like(mask) for site, mask in connected.items()}
        writes = {site: torch.zeros_like(mask) for site, mask in connected.items()}
        for source, target, nonzero in matrices:
            both = nonzero & connected[target][:, None] & connected[source][None, :]
            reads[source] |= both.any(0)
            writes[target] |= both.any(1)
        for site, mask in connected.items():
            if site == TOKENS:
                continue
            needed = mask.clone()
            if not site.endswith((".q", ".k", ".resid_delta")):
                needed &= reads[site]
            if not site.endswith(".act_in"):
                needed &= writes[site]
            if not torch.equal(needed, mask):
                connected[site], changed = needed, True
    if all(torch.equal(connected[site], mask) for site, mask in keep.items()):
        return keep
    return connected if selector.reaches(connected, _within(cut, connected)) else keep


def drop_unneeded(keep: Masks, selector: Selector, progress: bool = True) -> Masks:
    """Drop nodes one by one, cheapest first, as long as the target loss is still reached."""
    nodes = [(site, i) for site, mask in keep.items() for i in mask.nonzero()[:, 0].tolist()]

    def without(gone: Collection[tuple[str, int]]) -> tuple[Masks, Sequence[Edge]]:
        smaller = {site: mask.clone() for site, mask in keep.items()}
        for site, i in gone:
            smaller[site][i] = False
        return smaller, ()

    # Roughly first: an estimate for all nodes costs as much as measuring two or three of them.
    while len(nodes) > _FEW_NODES:
        estimates = selector.estimates(without(())[0])
        ordered = sorted(nodes, key=lambda node: estimates[node[0]][node[1]].item())
        dropped = selector.drop_in_order(ordered, without, patience=max(3, len(nodes) // 16))
        if not dropped:
            break
        keep = without(dropped)[0]
        nodes = [node for node in nodes if node not in dropped]
    return without(selector.drop_needless(nodes, without, "nodes", progress))[0]


def drop_edges(
    model: nn.Module, keep: Masks, selector: Selector, progress: bool = True
) -> tuple[Masks, list[Edge]]:
    """Cut weights between kept nodes one by one; nodes that are then unconnected go as well.

    Returns:
        The nodes that stay, and the edges between them that are cut.
    """
    nodes = {s: m.nonzero()[:, 0].tolist() for s, m in keep.items() if s != TOKENS}
    edges = circuit_edges(model, nodes)
    cut = selector.drop_needless(edges, lambda gone: (keep, gone), "edges", progress)
    keep = drop_unconnected(model, keep, selector, cut)
    return keep, _within(cut, keep)


def _within(cut: Sequence[Edge], keep: Masks) -> list[Edge]:
    """The cut edges whose both ends are kept."""
    return [e for e in cut if keep[e.source_site][e.source] and keep[e.target_site][e.target]]
