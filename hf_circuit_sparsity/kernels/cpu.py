"""The compiled kernels as functions of tensors, their work split among torch's threads.

All take and give float32 tensors on the CPU without gradient; `modeling/` and `optim/` put them
into autograd, and hold them against the plain paths that run without them.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .attention import AttentionKernels
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
    if _switched_off or torch.compiler.is_compiling():
        return None
    for x in tensors:
        if x.dtype != torch.float32 or x.device.type != "cpu":
            return None
        if type(x) not in (torch.Tensor, torch.nn.Parameter):  # fake or distributed
            return None
        if torch._C._functorch.is_functorch_wrapped_tensor(x):  # within torch.func
            return None
    return load_kernels()


@contextmanager
def without_kernels() -> Iterator[None]:
    """Within it, everything runs on torch and numpy; for tests and comparisons."""
    global _switched_off
    before, _switched_off = _switched_off, True
    try:
        yield
    finally:
        _switched_off = before
