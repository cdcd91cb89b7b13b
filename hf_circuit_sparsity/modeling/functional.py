"""AbsTopK and attention with a sink, as fast as they can be computed here.

[`abs_topk_reference`] and [`eager_attention_forward`] are the plain paths beside them.
"""

import functools
import importlib
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F


@functools.cache
def _kernels_room() -> ModuleType | None:
    try:  # not there beside a copy of this file that came from the Hub with a model
        return importlib.import_module("..kernels.cpu", __package__)
    except ImportError:
        return None


def compiled_kernels(*tensors: Tensor) -> Any:
    """The package's compiled kernels; None where there are none or they do not take the tensors."""
    room = _kernels_room()
    return None if room is None else room.compiled_kernels(*tensors)


def abs_topk_reference(x: Tensor, k: int) -> Tensor:
    """[`abs_topk`], written plainly: what the fast paths are held against."""
    largest = x.abs().sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return torch.zeros_like(x).scatter(-1, largest, x.gather(-1, largest))


def abs_topk(x: Tensor, k: int) -> Tensor:
    """Keep the k largest entries by magnitude along the last dimension and zero the others.

    AbsTopK of Gao et al. 2025; signs are kept, and the gradient reaches the kept entries only. Of
    equal magnitudes on the CPU the first are kept.

    Args:
        x: `(..., width)`, any floating dtype.
        k: entries to keep, 0 ≤ k ≤ width.
    """
    if k >= x.shape[-1]:
        return x
    # In forward-mode AD kernels and numpy would lose the derivative.
    plain = not torch.compiler.is_compiling() and forward_ad._current_level < 0
    if plain and k > 0 and x.numel() and x.device.type == "cpu":
        if kernels := compiled_kernels(x):
            return kernels.differentiable_abs_topk(x, k)
        return torch.where(_topk_mask(x.detach(), k), x, 0)
    largest = x.abs().topk(k, dim=-1, sorted=False).indices
    return torch.zeros_like(x).scatter(-1, largest, x.gather(-1, largest))


def _topk_mask(x: Tensor, k: int) -> Tensor:
    """Bool mask of the k largest magnitudes in every row of a CPU tensor, the first of equals."""
    # Magnitudes of floats are ordered as the integers of the same bits are, NaN above everything,
    # and numpy selects among integers several times faster than torch.topk among floats.
    width = x.shape[-1]
    integer = getattr(torch, f"int{8 * x.element_size()}")
    bits = x.reshape(-1, width).contiguous().view(integer).numpy()
    bits = bits & np.iinfo(bits.dtype).max
    threshold = np.partition(bits, width - k, axis=-1)[:, width - k, None]
    mask = bits >= threshold
    over = np.flatnonzero(np.count_nonzero(mask, axis=-1) > k)
    if over.size:  # the k-th magnitude is not unique: keep the first of those that equal it
        tied = bits[over] == threshold[over]
        above = mask[over] & ~tied
        room = k - np.count_nonzero(above, axis=-1)[:, None]
        mask[over] = above | (tied & (tied.cumsum(axis=-1) <= room))
    return torch.from_numpy(mask).view(x.shape)


def sdpa_attention_with_sink(
    query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float,
    dropout: float, s_aux: Tensor,
) -> Tensor:  # fmt: skip
    """Attention with a sink through fused kernels; `(B, H, T, K)` in, `(B, T, H, K)` out.

    Args:
        attention_mask: as of `scaled_dot_product_attention`; None is causal.
        s_aux: `(H,)`, the sinks: logits that only enter the softmax denominator.
    """
    fused_on_cpu = query.device.type == "cpu" and not torch.compiler.is_compiling()
    if fused_on_cpu and attention_mask is None and not dropout and query.shape[2]:
        if query.shape[2] > 1:
            # A static cache holds more keys than there are queries, none of them filled yet.
            key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
        kernels = compiled_kernels(query, key, value, s_aux)
        if kernels and kernels.can_attend(query, key, value):
            return kernels.differentiable_attention(query, key, value, s_aux, scaling)
    if query.shape[2] == 1 and attention_mask is None and not dropout:
        # As when text is generated: keys and values need not be copied.
        sink = s_aux.to(query.dtype).view(1, -1, 1, 1).expand(len(query), -1, 1, 1)
        scores = torch.cat([query @ key.transpose(-1, -2) * scaling, sink], dim=-1)
        weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
        return (weights[..., :-1] @ value).transpose(1, 2)
    # Else the sink is a first key whose value is zero. One extra channel, 1 in every query and
    # `s_aux / scaling` in that key only, makes the sink's logit its score. So no mask has to carry
    # it, and the causal kernels stay usable.
    batch, heads, queries, width = query.shape
    sink_key = query.new_zeros(batch, heads, 1, width + 1)
    sink_key[..., -1] = (s_aux / scaling).to(query.dtype).view(1, heads, 1)
    query = torch.cat([query, query.new_ones(batch, heads, queries, 1)], dim=-1)
    key = torch.cat([sink_key, F.pad(key, (0, 1))], dim=2)
    value = F.pad(value, (0, 1, 1, 0))  # a zero row in front; the extra channel keeps widths equal
    is_causal = attention_mask is None and queries > 1
    if is_causal:
        # A query in front of the others keeps the causal diagonal in place. A static cache holds
        # more keys than there are queries, none of them filled yet.
        query = F.pad(query, (0, 0, 1, 0))
        key, value = key[:, :, : queries + 1], value[:, :, : queries + 1]
    elif attention_mask is not None:
        seen = attention_mask.dtype == torch.bool  # in a boolean mask 1 is seen, in a float one 0
        attention_mask = F.pad(attention_mask, (1, 0), value=1 if seen else 0)
    attended = F.scaled_dot_product_attention(
        query, key, value, attention_mask, dropout, is_causal=is_causal, scale=scaling
    )
    return attended[:, :, int(is_causal) :, :width].transpose(1, 2)
