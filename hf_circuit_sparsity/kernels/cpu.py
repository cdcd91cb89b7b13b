"""The compiled kernels as functions of tensors, their work split among torch's threads.

All take and give float32 tensors on the CPU without gradient; `modeling/` and `trainer/` put them
into autograd. The plain paths they are held against are the ones used without them.
"""

import functools

from .attention import AttentionKernels
from .compile import build
from .products import ProductKernels
from .selection import SelectionKernels


class CpuKernels(SelectionKernels, ProductKernels, AttentionKernels):
    """All kernels; `load_kernels` makes the one instance."""


@functools.cache
def load_kernels() -> CpuKernels | None:
    """The kernels; None where they cannot be compiled. The first call may compile for seconds."""
    library = build()
    return None if library is None else CpuKernels(library)


__all__ = ["CpuKernels", "load_kernels"]
