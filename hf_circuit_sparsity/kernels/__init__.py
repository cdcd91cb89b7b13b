"""Compiled loops for the CPU, used wherever a C compiler is found, and by nothing else needed.

What is in `source/` is compiled on first use and kept in the user's cache folder. Without a
compiler, or with `HF_CIRCUIT_SPARSITY_KERNELS=0` in the environment, everything runs on torch and
numpy.
"""

from ..modeling.kernel_slot import fill_slot
from .cpu import CpuKernels, load_kernels
from .products import CompressedRows, NonzeroList

fill_slot(load_kernels)

__all__ = ["CompressedRows", "CpuKernels", "NonzeroList", "load_kernels"]
