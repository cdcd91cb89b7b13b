"""What attends to what: in the whole model, and on a circuit alone."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from ..decoders.decoder import decoder_of


@torch.no_grad()
def attention_patterns(
    model: nn.Module,
    token_ids: Sequence[int],
    layers: Sequence[int],
    within: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> dict[int, torch.Tensor]:
    """Attention weights of some layers on one sequence.

    Args:
        model: of an architecture that is described, see `docs/decoders.md`.
        token_ids: one sequence.
        layers: whose.
        within: made and entered around the run, e.g. to run on a circuit alone.

    Returns:
        Layer → `(heads, tokens, tokens)`, by query and then key. A row sums to less than 1 where
        the head has a sink.

    Raises:
        ValueError: the model has no attention that keeps its weights.
    """
    ids = torch.tensor([list(token_ids)], device=next(model.parameters()).device)
    missing = ValueError(
        f"{type(model).__name__} gives no attention weights, which are asked for: it needs an "
        'implementation of attention named "eager", as the models of transformers have.'
    )
    implementation = model.config._attn_implementation
    try:
        model.set_attn_implementation("eager")  # the others keep no weights
    except (AttributeError, ValueError, ImportError) as error:
        raise missing from error
    try:
        with within():
            output = model(ids, use_cache=False, logits_to_keep=1, output_attentions=True)
    finally:
        model.set_attn_implementation(implementation)
    if not output.attentions or any(output.attentions[layer] is None for layer in layers):
        raise missing
    return {layer: output.attentions[layer][0].float().cpu() for layer in layers}


def value_heads(model: nn.Module, nodes: dict[str, list[int]]) -> dict[int, list[int]]:
    """Layer → the query heads that read the circuit's values; layers without values are left out.

    Args:
        model: of an architecture that is described.
        nodes: site → indices, of the circuit.
    """
    decoder = decoder_of(model)
    group = decoder.n_heads // decoder.n_key_value_heads
    heads = {}
    for layer in range(len(decoder.layers)):
        shared = {i // decoder.head_dim for i in nodes.get(f"h.{layer}.attn.v", [])}
        if shared:
            heads[layer] = [group * s + h for s in sorted(shared) for h in range(group)]
    return heads


def overlap(one: torch.Tensor, other: torch.Tensor) -> float:
    """How much two patterns have in common, from 0 to 1, mean over heads and queries.

    One minus the total variation distance of what a query attends to; what is missing from 1 went
    to the sink, which counts as one more key.

    Args:
        one: `(heads, queries, keys)`, rows of at most 1.
        other: of the same shape.
    """
    keys = (one - other).abs().sum(-1) + (one.sum(-1) - other.sum(-1)).abs()
    return 1 - keys.mean().item() / 2
