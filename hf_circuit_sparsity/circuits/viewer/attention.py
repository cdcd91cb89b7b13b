"""Where attention heads look."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from ...modeling.modeling_circuitgpt import eager_attention_forward
from ..ablation import hooked_sites


@torch.no_grad()
def attention_patterns(
    model: nn.Module,
    token_ids: Sequence[int],
    layers: Sequence[int],
    within: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> dict[int, torch.Tensor]:
    """Attention weights of some layers on one sequence.

    They are computed from the recorded queries and keys, so that the model runs with whatever
    attention kernel it has.

    Args:
        model: a `CircuitGPTForCausalLM`.
        token_ids: one sequence.
        layers: whose.
        within: made and entered around the run, e.g. to run on a circuit alone.

    Returns:
        Layer → `(heads, tokens, tokens)`, by query and then key. A row sums to less than 1 where
        the head has a sink.
    """
    recorded: dict[str, torch.Tensor] = {}

    def keeper(site: str) -> Callable:
        def hook(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            recorded[site] = output

        return hook

    sites = [f"h.{layer}.attn.{part}" for layer in layers for part in "qk"]
    ids = torch.tensor([list(token_ids)], device=next(model.parameters()).device)
    with within(), hooked_sites(model, {site: keeper(site) for site in sites}):
        model(ids, use_cache=False, logits_to_keep=1)
    length = ids.shape[1]
    future = torch.ones(length, length, dtype=torch.bool, device=ids.device).triu(1)
    patterns = {}
    for layer in layers:
        attn = model.transformer.h[layer].attn
        query, key = (
            recorded[f"h.{layer}.attn.{part}"].view(1, length, -1, attn.head_dim).transpose(1, 2)
            for part in "qk"
        )
        mask = torch.zeros(length, length, dtype=query.dtype, device=ids.device)
        sink = None if attn.attn_imp is None else attn.attn_imp.sink_logit
        _, weights = eager_attention_forward(
            attn, query, key, torch.zeros_like(key), mask.masked_fill(future, -torch.inf),
            attn.scaling, s_aux=sink,
        )  # fmt: skip
        patterns[layer] = weights[0].float().cpu()
    return patterns
