"""The compiled kernels as functions of tensors, their work split among torch's threads.

All take and give float32 tensors on the CPU, without a gradient unless they say so; tests hold them
against the plain paths that run without them.
"""

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.utils import logging

from .blocks import BlockKernels
from .calling import takes
from .compile import SWITCH, build, warn_that_there_are_none
from .gates import GateKernels
from .products import ProductKernels
from .selection import SelectionKernels

if TYPE_CHECKING:
    from .gpu import TritonKernels

logger = logging.get_logger(__name__)

_switched_off = False


class CpuKernels(SelectionKernels, ProductKernels, BlockKernels, GateKernels):
    """All kernels; `load_kernels` makes the one instance."""


@functools.cache
def load_kernels() -> CpuKernels | None:
    """The kernels; None where they cannot be compiled. The first call may compile for seconds."""
    library = build()
    try:
        return None if library is None else CpuKernels(library)
    except AttributeError as error:  # what the compiler made is not what was asked for
        warn_that_there_are_none(str(error))
        return None


def compiled_kernels(*tensors: Tensor) -> CpuKernels | None:
    """The kernels, if there are some and they take these tensors: plain float32 on the CPU."""
    return None if _switched_off or not takes(*tensors) else load_kernels()


@functools.cache
def load_triton_kernels() -> "TritonKernels | None":
    """The kernels for GPUs; None without Triton, which is said once."""
    if os.environ.get(SWITCH) == "0":
        return None
    try:
        from .gpu import TritonKernels
    except ImportError as error:
        logger.warning_once(
            f"Triton cannot be imported ({error}): slower torch code selects on the GPU instead. "
            f"Install triton, or set {SWITCH}=0 to silence this."
        )
        return None
    return TritonKernels()


def selection_kernels(x: Tensor) -> "SelectionKernels | TritonKernels | None":
    """The kernels that select among the entries of `x` on its device, if there are some.

    On the CPU they take float32, on CUDA float32, bfloat16 and float16.
    """
    if x.device.type != "cuda":
        return compiled_kernels(x)
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    if _switched_off or not takes(x, device="cuda", dtypes=dtypes):
        return None
    return load_triton_kernels()


@contextmanager
def without_kernels() -> Iterator[None]:
    """Within it, everything runs on torch and numpy; for tests and comparisons."""
    global _switched_off
    before, _switched_off = _switched_off, True
    try:
        yield
    finally:
        _switched_off = before
