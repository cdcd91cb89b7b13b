"""Attention of the heads that count, where the others are fixed at their means.

A head whose values are all shut writes the same at every token: its mean value times the sum of
its weights. That sum is 1, or with a sink, where queries and keys are shut too, depends on how many
tokens are seen. So such heads need no scores.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..decoders.decoder import Decoder
from ..modeling.functional import sdpa_attention_with_sink

_NAME = "sdpa_of_open_heads"
_ATTRIBUTE = "_open_heads"


class OpenHeads(NamedTuple):
    """Heads of keys and values whose attention is computed, int64.

    Attributes:
        plain: those with an open value.
        with_sink: those of which anything is open.
    """

    plain: Tensor
    with_sink: Tensor


def open_heads(decoder: Decoder, layer: int, live: Mapping[str, Tensor]) -> OpenHeads | None:
    """The heads of a layer that count; None if that is all of them.

    Args:
        decoder: of the model.
        layer: its index.
        live: site → bool `(width,)`, nodes that may be open; a site that is not named is all open.
    """
    shared = decoder.n_key_value_heads

    def by_head(name: str) -> Tensor:
        nodes = live.get(f"h.{layer}.attn.{name}")
        if nodes is None:
            return torch.ones(shared, dtype=torch.bool)
        return nodes.cpu().view(shared, -1).any(1)  # query heads lie beside each other in groups

    value = by_head("v")
    anything = value | by_head("q") | by_head("k")
    if value.all():
        return None
    return OpenHeads(value.nonzero()[:, 0], anything.nonzero()[:, 0])


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, dropout: float = 0.0, s_aux: Tensor | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """As `sdpa`, for heads that count; `(B, H, T, K)` in, `(B, T, H, K)` out."""
    whole = ALL_ATTENTION_FUNCTIONS["sdpa"] if s_aux is None else sdpa_attention_with_sink
    given = {"scaling": scaling, "dropout": dropout, **kwargs}
    heads: OpenHeads | None = getattr(module, _ATTRIBUTE, None)
    if heads is None:
        if s_aux is not None:
            given["s_aux"] = s_aux
        return whole(module, query, key, value, attention_mask, **given)
    groups = query.shape[1] // key.shape[1]
    kept = (heads.plain if s_aux is None else heads.with_sink).to(query.device)
    out = value[:, :, :1].repeat_interleave(groups, 1).transpose(1, 2)  # (B, 1, H, K)
    out = out.expand(-1, query.shape[2], -1, -1)
    if s_aux is None:
        out = out.clone()
    else:
        out = out * _sums(query, key, attention_mask, scaling, s_aux)[..., None]
    if len(kept):
        queries = (kept[:, None] * groups + torch.arange(groups, device=kept.device)).flatten()
        if s_aux is not None:
            given["s_aux"] = s_aux[queries]
        some, _ = whole(
            module, query[:, queries], key[:, kept], value[:, kept],
            _of_heads(attention_mask, queries), **given,
        )  # fmt: skip
        out = out.index_copy(2, queries, some)
    return out, None


def _of_heads(mask: Tensor | None, heads: Tensor) -> Tensor | None:
    return mask if mask is None or mask.shape[1] == 1 else mask[:, heads]


def _sums(query: Tensor, key: Tensor, mask: Tensor | None, scaling: float, sink: Tensor) -> Tensor:
    """What the weights of heads sum to whose queries and keys are the same everywhere,
    `(B, T, H)`. Of what is described only CircuitGPT has sinks, and no rotary positions."""
    queries = query.shape[2]
    if mask is None:
        seen = torch.arange(1, queries + 1, device=query.device).to(query)[None, None]
        if queries == 1:
            seen = seen * key.shape[2]
    else:
        seen = (mask if mask.dtype == torch.bool else mask > -1).sum(-1).to(query)  # (B, 1 or H, T)
    groups = query.shape[1] // key.shape[1]
    one = key[:, :, 0].repeat_interleave(groups, 1)
    score = (query[:, :, 0] * one).sum(-1) * scaling  # (B, H)
    odds = (sink.to(score) - score).exp()[..., None]
    return (seen / (seen + odds)).transpose(1, 2)


@contextmanager
def attending(heads: Mapping[nn.Module, OpenHeads]) -> Iterator[None]:
    """Within the block these attention layers compute those heads alone, where they use sdpa."""
    configs = {id(m.config): m.config for m in heads if hasattr(m, "config")}
    configs = {k: c for k, c in configs.items() if c._attn_implementation == "sdpa"}
    modules = [m for m in heads if id(getattr(m, "config", None)) in configs]
    try:
        for module in modules:
            setattr(module, _ATTRIBUTE, heads[module])
        for config in configs.values():
            config._attn_implementation = _NAME
        yield
    finally:
        for module in modules:
            delattr(module, _ATTRIBUTE)
        for config in configs.values():
            config._attn_implementation = "sdpa"


AttentionInterface.register(_NAME, attend)
AttentionMaskInterface.register(_NAME, sdpa_mask)
