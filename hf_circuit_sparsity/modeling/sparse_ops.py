"""Sparse operations the model is built from."""

import torch


def abs_topk(x: torch.Tensor, k: int) -> torch.Tensor:
    """Keep the k largest entries by magnitude along the last dimension and zero the others.

    AbsTopK of Gao et al. 2025; signs are kept, and the gradient reaches the kept entries only.

    Args:
        x: `(..., width)`, any floating dtype.
        k: entries to keep, 0 ≤ k ≤ width.
    """
    if k >= x.shape[-1]:
        return x
    kept = x.abs().topk(k, dim=-1, sorted=False).indices
    return torch.zeros_like(x).scatter(-1, kept, x.gather(-1, kept))
