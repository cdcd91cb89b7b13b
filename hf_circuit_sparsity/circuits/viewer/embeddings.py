"""What the tokens and positions put on the residual channels that a circuit reads and writes."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

TOKENS_SHOWN = 10


def channel_embeddings(
    model: nn.Module, nodes: Mapping[str, Sequence[int]]
) -> list[dict[str, Any]]:
    """Embedding, position and unembedding weights of every residual channel of a circuit.

    Args:
        model: a `CircuitGPTForCausalLM`.
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
        for found, ending in ((reads, "act_in"), (writes, "resid_delta")):
            if site.endswith(ending):
                for channel in ids:
                    found.setdefault(channel, []).append(site)
    embedding = model.get_input_embeddings().weight.detach().float().cpu()
    unembedding = model.get_output_embeddings().weight.detach().float().cpu()
    positions = model.transformer.wpe.weight.detach().float().cpu()
    width = embedding.shape[1]
    # Where positions are concatenated, the channels after the residual ones are theirs.
    first_position = 0 if model.config.d_pos_emb is None else width
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
        if 0 <= channel - first_position < positions.shape[1]:
            column = positions[:, channel - first_position]
            entry["position"] = column.tolist() if column.any() else None
        channels.append({name: value for name, value in entry.items() if value is not None})
    return channels


def _strongest(column: torch.Tensor) -> dict[str, Any] | None:
    if not column.any():
        return None
    order = column.argsort(descending=True, stable=True).tolist()

    def pairs(tokens: list[int], sign: int) -> list[tuple[int, float]]:
        kept = [(token, column[token].item()) for token in tokens[:TOKENS_SHOWN]]
        return [(token, weight) for token, weight in kept if sign * weight > 0]

    return {
        "positive": pairs(order, 1),
        "negative": pairs(order[::-1], -1),
        "nonzeros": int((column != 0).sum()),
        "tokens": len(column),
    }
