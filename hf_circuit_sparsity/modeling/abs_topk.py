"""AbsTopK, the activation sparsity of the model, with a plain reference path beside it."""

from typing import Any

import numpy as np
import torch
from torch.autograd import forward_ad

from .kernel_slot import kernels_for
from .worker_threads import map_pieces

# Magnitudes of floats are ordered as the integers of the same bits are, NaN above everything, and
# numpy compares and selects among integers several times faster than torch.topk among floats.
_BITS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}
# Rows up to this width are partitioned outright: numpy is fastest on them. In wider rows a sorted
# sample of so many entries says where the threshold must be.
_SAMPLE = 512
# With fewer rows than this, as when text is generated, the sample's overhead is more than its gain.
_FEW_ROWS = 4
# Entries worked on at a time: a megabyte of float32, which stays in the second-level cache.
_PIECE = 1 << 18
# Half the width, in sampled entries, of the range the threshold is looked for in. Too narrow, and
# rows have to be looked at twice; too wide, and too many entries are listed.
_REACH = 8


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
    # In forward-mode AD kernels and numpy would lose the derivative.
    plain = not torch.compiler.is_compiling() and forward_ad._current_level < 0
    if plain and k > 0 and x.numel() and (kernels := kernels_for(x)):
        if torch.is_grad_enabled() and x.requires_grad:
            return _AbsTopK.apply(x, k, kernels)
        return kernels.abs_topk(x, k, want_mask=False)[0]
    if x.device.type == "cpu" and x.dtype in _BITS and plain:
        if torch.is_grad_enabled() and x.requires_grad:
            # A product with bytes is several times as fast as one with booleans, or as a choice
            # between x and 0, forward and backward.
            return x * topk_mask_cpu(x.detach(), k).view(torch.int8)
        return _topk_cpu(x, k, masks_only=False)
    kept = x.abs().topk(k, dim=-1, sorted=False).indices
    return torch.zeros_like(x).scatter(-1, kept, x.gather(-1, kept))


class _AbsTopK(torch.autograd.Function):
    """AbsTopK by the compiled kernels."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, k: int, kernels: Any) -> torch.Tensor:
        ctx.kernels = kernels
        out, mask = kernels.abs_topk(x, k, want_mask=True)
        ctx.save_for_backward(mask)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (mask,) = ctx.saved_tensors
        if torch.is_grad_enabled() or not kernels_for(grad):  # a gradient of the gradient is wanted
            return grad * mask, None, None
        return ctx.kernels.masked(grad, mask), None, None


def topk_mask_cpu(x: torch.Tensor, k: int) -> torch.Tensor:
    """Bool mask of the k largest magnitudes in every row, the first of equals.

    Args:
        x: `(..., width)` on the CPU, float16, bfloat16, float32 or float64; no gradient.
        k: 0 ≤ k ≤ width.
    """
    return _topk_cpu(x, k, masks_only=True)


def _topk_cpu(x: torch.Tensor, k: int, masks_only: bool) -> torch.Tensor:
    """`topk_mask_cpu`, or with `masks_only=False` the product of `x` and the mask."""
    width = x.shape[-1]
    out = torch.empty(x.shape, dtype=torch.bool if masks_only else x.dtype)
    if k < 1 or not x.numel():
        return out.zero_()
    # Rows may lie apart, as those of a query do that is a part of one projection.
    flat_x, flat_out = x.detach().reshape(-1, width), out.view(-1, width)
    if flat_x.stride(1) != 1:
        flat_x = flat_x.contiguous()
    bits = flat_x.view(_BITS[x.dtype]).numpy()
    out_bits = (flat_out if masks_only else flat_out.view(_BITS[x.dtype])).numpy()
    rows = max(1, _PIECE // width)

    def fill(start: int) -> None:
        piece = slice(start, start + rows)
        kept = out_bits[piece] if masks_only else np.empty(bits[piece].shape, bool)
        _mask_of_rows(bits[piece] & np.iinfo(bits.dtype).max, k, kept)
        if not masks_only:  # while the piece is still in the cache
            np.multiply(bits[piece], kept, out=out_bits[piece])

    map_pieces(fill, range(0, len(bits), rows))
    return out


def _mask_of_rows(bits: np.ndarray, k: int, mask: np.ndarray) -> None:
    """Fill `mask` with the k largest of every row of `bits`, the first of equals."""
    threshold, reaching = _kth_largest(bits, k)
    np.greater_equal(bits, threshold[:, None], out=mask)
    surplus = np.flatnonzero(reaching > k)
    if surplus.size:
        # Rows in which the k-th magnitude is not unique, mostly rows with fewer than k nonzeros.
        tied = bits[surplus] == threshold[surplus, None]
        above = mask[surplus] & ~tied
        room = k - _count(above)[:, None]
        mask[surplus] = above | (tied & (tied.cumsum(axis=-1, dtype=np.int32) <= room))


def _kth_largest(bits: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k-th largest entry of every row of non-negative integers, and how many reach it."""
    rows, width = bits.shape
    if width <= _SAMPLE or rows < _FEW_ROWS:
        threshold = np.partition(bits, width - k, axis=-1)[:, width - k]
        return threshold, _count(bits >= threshold[:, None])
    # A sorted sample gives a first guess. Counting what reaches it says which way and how far
    # along the sample the threshold is; a second place somewhat beyond it closes the range. The
    # entries in this range are listed, and the threshold is settled on the list.
    sample = np.sort(bits[:, :: width // _SAMPLE], axis=-1)
    size = sample.shape[1]
    each = np.arange(rows)
    place = np.full(rows, min(size - round(size * k / width), size - 1))
    guess = sample[:, place[0]]
    at_zero = np.flatnonzero(guess == 0)
    if at_zero.size:  # zeros are many, as behind a ReLU: begin behind them
        guess = np.maximum(guess, 1)
        place[at_zero] = size - np.count_nonzero(sample[at_zero], axis=-1)
    reaches_guess = bits >= guess[:, None]
    n_guess = _count(reaches_guess)
    up = n_guess >= k
    moved = place + (n_guess - k) * (size / width) + np.where(up, _REACH, -_REACH)
    second = sample[each, np.clip(moved, 0, size - 1).astype(np.intp)]
    largest = np.iinfo(bits.dtype).max
    second = np.where(up, np.minimum(second, largest - 1) + 1, np.maximum(second, 1))
    second[moved > size - 1] = largest
    second[moved < 0] = 1
    reaches_second = bits >= second[:, None]
    n_second = _count(reaches_second)

    fewer, more = np.minimum(n_guess, n_second), np.maximum(n_guess, n_second)
    found = (fewer < k) & (k <= more)
    all_zero = ~up & (second == 1) & (more < k)  # the k-th largest of such a row is 0
    listed = np.logical_xor(reaches_guess, reaches_second, out=reaches_second)
    n_listed = more - fewer
    if not found.all():
        listed[~found] = False
        n_listed[~found] = 0
    longest = max(1, int(n_listed.max()))
    candidates = np.full((rows, longest), -1, bits.dtype)
    candidates[np.arange(longest) < n_listed[:, None]] = bits.reshape(-1)[np.flatnonzero(listed)]
    candidates.sort(axis=-1)
    threshold = candidates[each, np.clip(longest - (k - fewer), 0, longest - 1)]
    reaching = fewer + (candidates >= threshold[:, None]).sum(axis=-1)
    threshold[all_zero] = 0
    reaching[all_zero] = width
    lost = np.flatnonzero(~found & ~all_zero)
    if lost.size:  # the sample misled
        threshold[lost] = np.partition(bits[lost], width - k, axis=-1)[:, width - k]
        reaching[lost] = _count(bits[lost] >= threshold[lost, None])
    return threshold, reaching


def _count(mask: np.ndarray) -> np.ndarray:
    """True entries per row of a contiguous mask."""
    width = mask.shape[-1]
    if width % 8 or not hasattr(np, "bitwise_count"):  # numpy < 2
        return np.count_nonzero(mask, axis=-1)
    return np.bitwise_count(mask.view(np.uint64)).sum(axis=-1, dtype=np.uint32).astype(np.int64)
