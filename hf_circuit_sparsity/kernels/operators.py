"""Kernels as operators of torch, which `torch.compile` takes as they are.

What they compute cannot be traced, and what can be traced is slower: so compiled code calls them.
"""

import torch
from torch import Tensor

from .cpu import selection_kernels


@torch.library.custom_op("hf_circuit_sparsity::abs_topk", mutates_args=())
def abs_topk(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest magnitudes along the last dimension, zeros elsewhere, and a bool mask of them.

    Args:
        x: `(..., width)`, any floating dtype.
        k: 1 ≤ k < width.
    """
    if x.numel() and (kernels := selection_kernels(x)):
        return kernels.abs_topk(x, k, want_mask=True)
    first = x.abs().sort(dim=-1, descending=True, stable=True).indices[..., :k]
    mask = torch.zeros(x.shape, dtype=torch.bool, device=x.device).scatter_(-1, first, True)
    return x.contiguous().masked_fill(~mask, 0), mask


@abs_topk.register_fake
def _(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=torch.bool)


def _keep_mask(ctx, inputs: tuple[Tensor, int], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])


def _backward(ctx, grad: Tensor, _: Tensor | None) -> tuple[Tensor, None]:
    (mask,) = ctx.saved_tensors
    return torch.where(mask, grad, 0), None


abs_topk.register_autograd(_backward, setup_context=_keep_mask)
