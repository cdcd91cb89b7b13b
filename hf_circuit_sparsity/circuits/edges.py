"""Edges of a circuit: the nonzero weights between two of its nodes (Gao et al. 2025, section 2)."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn


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
    embedding = model.get_input_embeddings().weight.detach()
    width = embedding.shape[1]  # channels past it are concatenated positions
    read = {c for site, ids in nodes.items() if site.endswith("act_in") for c in ids if c < width}
    return [
        (token, channel, embedding[token, channel].item())
        for token in sorted(set(token_ids))
        for channel in sorted(read)
        if embedding[token, channel] != 0
    ]


def unembedding_edges(
    model: nn.Module, nodes: Mapping[str, Sequence[int]], token_ids: Sequence[int]
) -> list[tuple[int, int, float]]:
    """Nonzero unembedding entries of these tokens on the channels the circuit writes to.

    Returns:
        Triples of residual channel, token id, weight.
    """
    unembedding = model.get_output_embeddings().weight.detach()
    written = {c for site, ids in nodes.items() if site.endswith("resid_delta") for c in ids}
    return [
        (channel, token, unembedding[token, channel].item())
        for channel in sorted(written)
        for token in sorted(set(token_ids))
        if unembedding[token, channel] != 0
    ]
