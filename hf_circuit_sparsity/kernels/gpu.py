"""The Triton kernels, as `load_triton_kernels` makes them."""

from .triton_abs_topk import TritonAbsTopK
from .triton_projection import TritonProjection


class TritonKernels(TritonAbsTopK, TritonProjection):
    """All kernels for a GPU.

    Args:
        per_thread: entries of a row that one thread holds.
        block: entries of a matrix that one program reads.
        warps: of such a program.
    """

    def __init__(self, per_thread: int = 32, block: int = 4096, warps: int = 4):
        TritonAbsTopK.__init__(self, per_thread)
        TritonProjection.__init__(self, per_thread, block, warps)
