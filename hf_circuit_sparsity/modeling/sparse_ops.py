"""Sparse operations the model is built from, each with a plain reference path beside it."""

import numpy as np
import torch

# Magnitudes of floats are ordered as the integers of the same bits are, NaN above everything, and
# numpy selects among integers several times faster than torch.topk among floats.
_BITS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}


def abs_topk_reference(x: torch.Tensor, k: int) -> torch.Tensor:
    """[`abs_topk`], written plainly: what the fast path is held against."""
    kept = x.abs().sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return torch.zeros_like(x).scatter(-1, kept, x.gather(-1, kept))


def abs_topk(x: torch.Tensor, k: int) -> torch.Tensor:
    """Keep the k largest entries by magnitude along the last dimension and zero the others.

    AbsTopK of Gao et al. 2025; signs are kept, and the gradient reaches the kept entries only. Of
    equal magnitudes on the CPU the first are kept.

    Args:
        x: `(..., width)`, any floating dtype.
        k: entries to keep, 0 ≤ k ≤ width.
    """
    if k >= x.shape[-1]:
        return x
    if x.device.type == "cpu" and x.dtype in _BITS and not torch.compiler.is_compiling():
        # A product is over twice as fast as a choice between x and 0, forward and backward.
        return x * _topk_mask_cpu(x.detach(), k)
    kept = x.abs().topk(k, dim=-1, sorted=False).indices
    return torch.zeros_like(x).scatter(-1, kept, x.gather(-1, kept))


def _topk_mask_cpu(x: torch.Tensor, k: int) -> torch.Tensor:
    """Bool mask of the k largest magnitudes in every row, the first of equals."""
    width = x.shape[-1]
    if k < 1 or not x.numel():
        return torch.zeros_like(x, dtype=torch.bool)
    bits = x.abs().view(_BITS[x.dtype])
    rank = width - k
    threshold = torch.from_numpy(np.partition(bits.numpy(), rank, axis=-1)[..., rank, None])
    mask = bits >= threshold
    surplus = mask.sum(-1) > k
    if surplus.any():
        # Rows in which the k-th magnitude is not unique, mostly rows with fewer than k nonzeros.
        tied = bits[surplus] == threshold[surplus]
        above = mask[surplus] & ~tied
        room = k - above.sum(-1, keepdim=True)
        mask[surplus] = above | (tied & (tied.cumsum(-1) <= room))
    return mask
