"""AbsTopK on a GPU, in Triton: one program for a row, which stays in its registers."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .calling import as_rows
from .selection import SelectionKernels
from .triton_search import integers, kth_largest, largest, on, warps


class TritonAbsTopK:
    """AbsTopK; [`SelectionKernels`] says what its methods have in common.

    Args:
        per_thread: entries of a row that one thread holds.
    """

    differentiable_abs_topk = SelectionKernels.differentiable_abs_topk

    def __init__(self, per_thread: int = 32):
        self.per_thread = per_thread

    def abs_topk(self, x: Tensor, k: int, want_mask: bool) -> tuple[Tensor, Tensor | None]:
        """The k largest magnitudes of every row, zeros elsewhere, and a bool mask of them.

        Args:
            x: `(..., width)`, of 16 or 32 bits.
            k: 1 ≤ k < width.
        """
        rows = integers(as_rows(x))
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        mask = torch.empty(x.shape, dtype=torch.bool, device=x.device) if want_mask else None
        flags = out if mask is None else mask.view(torch.int8)
        n, width = rows.shape
        with on(x.device):
            _abs_topk[(n,)](
                rows, rows.stride(0), integers(out), flags, width, k, largest(x.dtype),
                want_mask, triton.next_power_of_2(width), num_warps=warps(width, self.per_thread),
            )  # fmt: skip
        return out, mask

    def masked(self, x: Tensor, mask: Tensor) -> Tensor:
        """`x` where the bool `mask` of its shape is true, else 0."""
        return torch.where(mask, x, 0)


@triton.jit(do_not_specialize=["k"])
def _abs_topk(
    x, stride, out, mask, width, k, LARGEST: tl.constexpr, MASK: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    values = tl.load(x + row * stride + column, mask=inside, other=0)
    bits = tl.where(inside, values.to(tl.int32) & LARGEST, -1)
    threshold, n = kth_largest(bits, k, 0)
    keep = bits >= threshold
    if n > k:  # of those that equal the threshold the first are kept
        above = bits > threshold
        tied = (bits == threshold).to(tl.int32)
        room = k - tl.sum(above.to(tl.int32), 0)
        keep = above | ((tied > 0) & (tl.cumsum(tied, 0) <= room))
    tl.store(out + row * width + column, tl.where(keep, values, 0), mask=inside)
    if MASK:
        tl.store(mask + row * width + column, keep.to(tl.int8), mask=inside)
