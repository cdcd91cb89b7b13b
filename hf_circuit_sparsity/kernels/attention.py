"""Causal attention with a sink."""

import ctypes
from typing import Any

import torch
from torch import Tensor

from .calling import LANES, Library, Shared, float_bits, pieces

# Channels that a head may have, as in attention.c.
ATTENTION_WIDTHS = (16, 32, 64)


class AttentionKernels(Library):
    """Kernels of attention.c."""

    def __init__(self, library: ctypes.CDLL):
        super().__init__(library)
        self._attend = Shared(library, "attend")
        self._attend_back = Shared(library, "attend_back")

    def can_attend(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """Whether `attend` takes them: in shape, and in how they lie in memory."""
        return (
            query.shape[2] > 1
            and query.shape[3] in ATTENTION_WIDTHS
            and all(x.stride(3) == 1 and x.shape == query.shape for x in (query, key, value))
        )

    def differentiable_attention(
        self, query: Tensor, key: Tensor, value: Tensor, sink: Tensor, scale: float
    ) -> Tensor:
        """Of the arguments of [`AttentionKernels.attend`], with a gradient: `(B, T, H, K)`."""
        return _AttentionByKernels.apply(query, key, value, sink, scale, self).transpose(1, 2)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, sink: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Causal attention with a sink.

        Args:
            query, key, value: `(B, H, T, K)`, K one of `ATTENTION_WIDTHS`.
            sink: `(H,)`, a logit that only enters the softmax denominator.
            scale: of the scores.

        Returns:
            `(B, H, T, K)`, which lies as `(B, T, H, K)`, and the logarithm of the softmax
            denominator with the sink, `(B, H, T)`.
        """
        batch, heads, tokens, width = query.shape
        out = torch.empty(batch, tokens, heads, width).transpose(1, 2)
        tops, sums = torch.empty(2, batch, heads, tokens)
        sink = sink.detach().contiguous()
        places = [_Heads.of(x) for x in (query, key, value, out)]
        q, k, v, o = (ctypes.addressof(place) for place in places)

        parts = pieces(batch * heads, 1)
        own_size = (2 * width + LANES) * _round_up(tokens) + 2 * width * LANES
        scratch = torch.empty(len(parts), own_size)
        self._attend([
            (
                q, k, v, heads, tokens, width, float_bits(scale), sink.data_ptr(), part.start,
                part.stop, o, tops.data_ptr(), sums.data_ptr(), own.data_ptr(),
            )
            for part, own in zip(parts, scratch, strict=True)
        ])  # fmt: skip
        return out, sums.log_().add_(tops)

    def attend_back(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sink: Tensor,
        scale: float,
        out: Tensor,
        log_sum: Tensor,
        grad: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The gradients of `attend` for query, key, value and sink, given that of its output."""
        batch, heads, tokens, width = query.shape
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        grads = [torch.empty(batch, tokens, heads, width).transpose(1, 2) for _ in range(3)]
        grad_sink = torch.empty(batch, heads)
        sink = sink.detach().contiguous()
        places = [_Heads.of(x) for x in (query, key, value, out, grad, *grads)]
        q, k, v, o, g, *of_grads = (ctypes.addressof(place) for place in places)

        parts = pieces(batch * heads, 1)
        own_size = (4 * width + 2 * LANES) * _round_up(tokens) + 4 * width * LANES
        scratch = torch.empty(len(parts), own_size)
        self._attend_back([
            (
                q, k, v, o, g, log_sum.data_ptr(), heads, tokens, width, float_bits(scale),
                sink.data_ptr(), part.start, part.stop, *of_grads, grad_sink.data_ptr(),
                own.data_ptr(),
            )
            for part, own in zip(parts, scratch, strict=True)
        ])  # fmt: skip
        return *grads, grad_sink.sum(0)


def attend_reference(
    query: Tensor, key: Tensor, value: Tensor, sink: Tensor, scale: float
) -> Tensor:
    """The first of what [`AttentionKernels.attend`] returns, written plainly."""
    tokens = query.shape[2]
    future = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).triu(1)
    scores = (query @ key.mT * scale).masked_fill(future, -torch.inf)
    sinks = sink.view(1, -1, 1, 1).expand(len(query), -1, tokens, 1)
    return torch.cat([scores, sinks], dim=-1).softmax(dim=-1)[..., :-1] @ value


class _AttentionByKernels(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query, key, value, sink, scale: float, kernels: Any) -> Tensor:
        out, log_sum = kernels.attend(query, key, value, sink, scale)
        ctx.save_for_backward(query, key, value, sink, out, log_sum)
        ctx.scale, ctx.kernels = scale, kernels
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sink, out, log_sum = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated again, which kernels cannot be
            inputs = (query, key, value, sink)
            needed = [x for x in inputs if x.requires_grad]
            again = attend_reference(*inputs, ctx.scale)
            found = iter(torch.autograd.grad(again, needed, grad, create_graph=True))
            return *(next(found) if x.requires_grad else None for x in inputs), None, None
        grads = ctx.kernels.attend_back(query, key, value, sink, ctx.scale, out, log_sum, grad)
        return *grads, None, None


class _Heads(ctypes.Structure):
    """`struct heads` of attention.c: where the matrices of sequences and heads are."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("sequence", ctypes.c_int64),
        ("head", ctypes.c_int64),
        ("token", ctypes.c_int64),
    ]

    @classmethod
    def of(cls, x: Tensor) -> "_Heads":
        """Of a tensor `(B, H, T, K)` whose channels lie next to each other."""
        return cls(x.data_ptr(), x.stride(0), x.stride(1), x.stride(2))


def _round_up(tokens: int) -> int:
    return -(-tokens // LANES) * LANES
