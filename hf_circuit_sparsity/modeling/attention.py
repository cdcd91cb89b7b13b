"""Attention with a sink: a logit per head that only enters the softmax denominator.

`eager_attention_forward` in `modeling_circuitgpt.py` is the readable reference.
"""

from typing import Any

import torch
from torch.nn import functional as F

from .kernel_slot import kernels_for


def sdpa_attention_with_sink(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float,
    sink_logit: torch.Tensor,
) -> torch.Tensor:
    """Attention with a sink through torch's fused kernels.

    Args:
        query: `(B, H, T, K)`; key, value: `(B, H, past + T, K)`.
        attention_mask: as of `scaled_dot_product_attention`; None is causal.
        scaling: of the scores.
        dropout: of the attention weights.
        sink_logit: `(H,)`, a logit that only enters the softmax denominator.

    Returns:
        `(B, T, H, K)`.
    """
    fused_on_cpu = query.device.type == "cpu" and not torch.compiler.is_compiling()
    if fused_on_cpu and attention_mask is None and not dropout and query.shape[2]:
        if query.shape[2] > 1:
            # A static cache holds more keys than there are queries, none of them filled yet.
            key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
        kernels = kernels_for(query, key, value, sink_logit)
        if kernels and kernels.can_attend(query, key, value):
            attended = _AttentionByKernels.apply(query, key, value, sink_logit, scaling, kernels)
        else:
            attended = _CausalSinkAttention.apply(query, key, value, sink_logit, scaling)
        return attended.transpose(1, 2)
    return sink_as_key(query, key, value, attention_mask, scaling, dropout, sink_logit)


def sink_as_key(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float,
    sink_logit: torch.Tensor,
) -> torch.Tensor:
    """[`sdpa_attention_with_sink`] through `scaled_dot_product_attention`.

    The sink becomes a key in front of the others whose value is zero. One extra channel, 1 in
    every query and `sink_logit / scaling` in that key only, makes its score the sink's logit for
    every query, so that no mask has to carry it and the causal kernels stay usable.
    """
    batch, heads, queries, width = query.shape
    sink_key = query.new_zeros(batch, heads, 1, width + 1)
    sink_key[..., -1] = (sink_logit / scaling).to(query.dtype).view(1, heads, 1)
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
        query,
        key,
        value,
        attn_mask=attention_mask,
        dropout_p=dropout,
        is_causal=is_causal,
        scale=scaling,
    )
    return attended[:, :, int(is_causal) :, :width].transpose(1, 2)


class _AttentionByKernels(torch.autograd.Function):
    """Causal attention with a sink by the compiled kernels."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sink_logit: torch.Tensor,
        scaling: float,
        kernels: Any,
    ) -> torch.Tensor:
        out, log_sum = kernels.attend(query, key, value, sink_logit, scaling)
        ctx.save_for_backward(query, key, value, sink_logit, out, log_sum)
        ctx.scaling, ctx.kernels = scaling, kernels
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, sink_logit, out, log_sum = ctx.saved_tensors
        grads = ctx.kernels.attend_back(
            query, key, value, sink_logit, ctx.scaling, out, log_sum, grad
        )
        return *grads, None, None


class _CausalSinkAttention(torch.autograd.Function):
    """Causal attention with a sink from torch's CPU kernel, which knows no sink.

    The kernel also gives the log of its softmax denominator, and the sink only enlarges that: the
    output shrinks by the ratio of the two. The kernel's backward pass works from output and
    denominator; given the enlarged ones, it is exact for attention with a sink.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sink_logit: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        causal = query.shape[2] > 1
        out, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, scale=scaling
        )
        sink = sink_logit.to(log_sum.dtype).view(1, -1, 1)
        log_sum_with_sink = torch.logaddexp(log_sum, sink)
        out = out * (log_sum - log_sum_with_sink).exp()[..., None].to(out.dtype)
        ctx.save_for_backward(query, key, value, out, log_sum_with_sink, sink_logit)
        ctx.causal, ctx.scaling = causal, scaling
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, out, log_sum, sink_logit = ctx.saved_tensors
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, query, key, value, out, log_sum, 0.0, ctx.causal, scale=ctx.scaling
        )
        grad_sink = None
        if ctx.needs_input_grad[3]:
            # Softmax backward at the sink, whose value is zero.
            through = (grad * out).sum(-1, dtype=log_sum.dtype)
            weight = (sink_logit.to(log_sum.dtype).view(1, -1, 1) - log_sum).exp()
            grad_sink = -(weight * through).sum((0, 2)).to(sink_logit.dtype)
        return *grads, grad_sink, None
