"""AbsTopK and attention with a sink, as fast as can be, and the plain paths beside them."""

import importlib
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

try:  # not there beside a copy of this file that came from the Hub with a model
    _kernels = importlib.import_module("..kernels.cpu", __package__)
    compiled_kernels, selection_kernels = _kernels.compiled_kernels, _kernels.selection_kernels
    abs_topk_operator = importlib.import_module("..kernels.operators", __package__).abs_topk
except ImportError:

    def compiled_kernels(*tensors: Tensor) -> None:
        """The compiled kernels: there are none."""

    selection_kernels, abs_topk_operator = compiled_kernels, None


def abs_topk_reference(x: Tensor, k: int) -> Tensor:
    """[`abs_topk`], written plainly: what the fast paths are held against."""
    largest = x.abs().sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return torch.zeros_like(x).scatter(-1, largest, x.gather(-1, largest))


def abs_topk(x: Tensor, k: int) -> Tensor:
    """Keep the k largest entries by magnitude along the last dimension and zero the others.

    AbsTopK of Gao et al. 2025; the gradient reaches what is kept. Of equals kernels keep the first.

    Args:
        x: `(..., width)`, any floating dtype.
        k: entries to keep, 0 ≤ k ≤ width.
    """
    if k >= x.shape[-1]:
        return x
    # In forward-mode AD and torch.func kernels and numpy would lose the derivative.
    special = forward_ad._current_level >= 0 or not k
    special = special or torch._C._functorch.maybe_current_level() is not None
    if torch.compiler.is_compiling() and not special and abs_topk_operator:
        return abs_topk_operator(x, k)[0]
    special = special or torch.compiler.is_compiling() or not x.numel()
    if not special and (kernels := selection_kernels(x)):
        return kernels.differentiable_abs_topk(x, k)
    if not special and x.device.type == "cpu":
        if not (torch.is_grad_enabled() and x.requires_grad):
            return _largest(x.detach(), k, mask_only=False)
        # A product with bytes takes an eighth of the time of one with booleans, or of a choice.
        mask = _largest(x.detach(), k, mask_only=True)
        return abs_topk_reference(x, k) if mask is None else x * mask.view(torch.int8)
    largest = x.abs().topk(k, dim=-1, sorted=False).indices
    return torch.zeros_like(x).scatter(-1, largest, x.gather(-1, largest))


def _largest(x: Tensor, k: int, mask_only: bool) -> Tensor | None:
    """The k largest of every row of a CPU tensor; as a mask, None if they are not all finite."""
    # Magnitudes sort as the integers of the same bits, NaN last; numpy selects those much faster.
    width, integer = x.shape[-1], getattr(torch, f"int{8 * x.element_size()}")
    bits = x.reshape(-1, width).contiguous().view(integer).numpy()
    out = np.empty(bits.shape, bool if mask_only else bits.dtype)
    step = max(1, (1 << 18) // width)  # rows of a megabyte, which stays in the cache
    for piece in (slice(start, start + step) for start in range(0, len(bits), step)):
        sizes = bits[piece] & torch.iinfo(integer).max
        threshold = np.partition(sizes, width - k, axis=-1)[:, width - k, None]
        if mask_only and not torch.from_numpy(threshold).view(x.dtype).isfinite().all():
            return None
        mask = sizes >= threshold
        over = np.flatnonzero(np.count_nonzero(mask, axis=-1) > k)
        if over.size:  # the k-th magnitude is not unique: keep the first of those that equal it
            tied = sizes[over] == threshold[over]
            room = k - np.count_nonzero(mask[over] & ~tied, axis=-1)[:, None]
            mask[over] &= ~tied | (tied.cumsum(axis=-1) <= room)
        out[piece] = mask if mask_only else bits[piece] * mask
    return torch.from_numpy(out).view(torch.bool if mask_only else x.dtype).view(x.shape)


def eager_attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float, dropout: float = 0.0, s_aux: Tensor | None = None, **kwargs: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The readable reference: `(B, H, T, K)` in, `(B, T, H, K)` and the weights out."""
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    if s_aux is not None:
        # The sink takes part in the softmax and then drops out: it only adds to the denominator.
        sink = s_aux.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sink], dim=-1)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)[..., : key.shape[-2]]
    attended = F.dropout(weights, p=dropout, training=module.training) @ value
    return attended.transpose(1, 2), weights


def sdpa_attention_with_sink(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float, dropout: float, s_aux: Tensor, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention with a sink through fused kernels; `(B, H, T, K)` in, `(B, T, H, K)` out.

    Args:
        attention_mask: as of `scaled_dot_product_attention`; None is causal.
        s_aux: `(H,)`, the sinks: logits that only enter the softmax denominator.
    """
    batch, heads, queries, width = query.shape
    is_causal = attention_mask is None and queries > 1
    if is_causal:
        # A static cache holds more keys than there are queries, none of them filled yet.
        key, value = key[:, :, :queries], value[:, :, :queries]
    if attention_mask is None and not dropout:
        on_cpu = query.device.type == "cpu" and not torch.compiler.is_compiling() and queries
        kernels = on_cpu and compiled_kernels(query, key, value, s_aux)
        if kernels and kernels.can_attend(query, key, value):
            return kernels.differentiable_attention(query, key, value, s_aux, scaling), None
        if queries == 1:  # as when text is generated: keys and values need not be copied
            attend = eager_attention_forward
            return attend(module, query, key, value, None, scaling, s_aux=s_aux)[0], None
    # Else the sink is a first key whose value is zero. One extra channel, 1 in every query and
    # `s_aux / scaling` in that key only, makes the sink's logit its score. So no mask has to carry
    # it, and the causal kernels stay usable.
    sink_key = query.new_zeros(batch, heads, 1, width + 1)
    sink_key[..., -1] = (s_aux / scaling).to(query.dtype).view(1, heads, 1)
    query = torch.cat([query, query.new_ones(batch, heads, queries, 1)], dim=-1)
    key = torch.cat([sink_key, F.pad(key, (0, 1))], dim=2)
    value = F.pad(value, (0, 1, 1, 0))  # a zero row in front; the extra channel keeps widths equal
    if is_causal:  # a query in front of the others keeps the causal diagonal in place
        query = F.pad(query, (0, 0, 1, 0))
    elif attention_mask is not None:
        seen = attention_mask.dtype == torch.bool  # in a boolean mask 1 is seen, in a float one 0
        attention_mask = F.pad(attention_mask, (1, 0), value=1 if seen else 0)
    attended = F.scaled_dot_product_attention(
        query, key, value, attention_mask, dropout, is_causal=is_causal, scale=scaling
    )
    return attended[:, :, int(is_causal) :, :width].transpose(1, 2), None
