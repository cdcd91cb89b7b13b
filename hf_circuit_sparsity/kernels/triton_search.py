"""What the Triton kernels that select share: magnitudes as integers, and the search for a rank.

Everything works on the bit patterns of the magnitudes: those of non-negative floats, read as
integers, sort like the floats, with NaN and infinity above all numbers. Every decision is made on
the device; the host waits for none.
"""

import contextlib
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

# Longest row that one program holds.
MAX_WIDTH = 16384
INTEGER = {2: torch.int16, 4: torch.int32}


def integers(x: Tensor) -> Tensor:
    """The bit patterns of floats of 16 or 32 bits."""
    return x.view(INTEGER[x.element_size()])


def largest(dtype: torch.dtype) -> int:
    """All bits but the sign."""
    return 2 ** (8 * dtype.itemsize - 1) - 1


def infinity(dtype: torch.dtype) -> int:
    """The bit pattern of infinity."""
    return int(integers(torch.tensor(math.inf, dtype=dtype)))


def on(device: torch.device) -> contextlib.AbstractContextManager:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def warps(width: int, per_thread: int) -> int:
    """Of a program that holds a row."""
    return min(max(1, triton.next_power_of_2(width) // (32 * per_thread)), 16)


@triton.jit
def kth_largest(bits, k, tolerance):
    """A value that at least k entries reach, k + tolerance at most if possible; how many do.

    With no tolerance, the largest such value, if not exactly k entries reach a smaller one.
    """
    high = tl.max(bits, 0)
    low = high - high
    n = tl.sum((bits >= 0).to(tl.int32), 0)
    while low < high:
        gap = high - low
        middle = low + (gap >> 1) + (gap & 1)
        count = tl.sum((bits >= middle).to(tl.int32), 0)
        enough = count >= k
        n = tl.where(enough, count, n)
        low = tl.where(enough, middle, low)
        high = tl.where(enough, tl.where(count <= k + tolerance, middle, high), middle - 1)
    return low, n
