"""The compiled kernels as functions of tensors, their work split among torch's threads.

All take and give float32 tensors on the CPU, without a gradient unless they say so; tests hold them
against the plain paths that run without them.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from .attention import AttentionKernels
from .calling import takes
from .compile import build
from .products import ProductKernels
from .selection import SelectionKernels

_switched_off = False


class CpuKernels(SelectionKernels, ProductKernels, AttentionKernels):
    """All kernels; `load_kernels` makes the one instance."""


@functools.cache
def load_kernels() -> CpuKernels | None:
    """The kernels; None where they cannot be compiled. The first call may compile for seconds."""
    library = build()
    return None if library is None else CpuKernels(library)


def compiled_kernels(*tensors: Tensor) -> CpuKernels | None:
    """The kernels, if there are some and they take these tensors: plain float32 on the CPU."""
    return None if _switched_off or not takes(*tensors) else load_kernels()


@contextmanager
def without_kernels() -> Iterator[None]:
    """Within it, everything runs on torch and numpy; for tests and comparisons."""
    global _switched_off
    before, _switched_off = _switched_off, True
    try:
        yield
    finally:
        _switched_off = before
