"""What the wrappers of all kernels share: calling C, and splitting work among threads."""

import ctypes
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

LANES = 16  # as in lanes.h
PIECE = 1 << 16  # entries worth a thread of their own

Piece = TypeVar("Piece")
Result = TypeVar("Result")

_pools: dict[int, ThreadPoolExecutor] = {}
if hasattr(os, "register_at_fork"):  # threads do not survive a fork, a pool would wait for them
    os.register_at_fork(after_in_child=_pools.clear)


class Library:
    """Base of the groups of kernels; each declares its own functions of the compiled library."""

    def __init__(self, library: ctypes.CDLL):
        pass


def declare(function: Callable, arguments: str, result: type | None = None) -> Callable:
    """Say what a C function takes: pointers, integers, bit patterns, flags and decimals."""
    kinds = {
        "p": ctypes.c_void_p,
        "i": ctypes.c_int64,
        "u": ctypes.c_uint32,
        "f": ctypes.c_int,
        "d": ctypes.c_float,
    }
    function.argtypes = [kinds[kind] for kind in arguments]
    function.restype = result
    return function


def takes(
    *tensors: Tensor, device: str = "cpu", dtypes: tuple[torch.dtype, ...] = (torch.float32,)
) -> bool:
    """Whether kernels take these: plain tensors of a device and a dtype, and nothing compiles."""
    if torch.compiler.is_compiling():
        return False
    for x in tensors:
        if x.dtype not in dtypes or x.device.type != device:
            return False
        if type(x) not in (torch.Tensor, torch.nn.Parameter):  # fake or distributed
            return False
        if torch._C._functorch.is_functorch_wrapped_tensor(x):  # within torch.func
            return False
    return True


def as_rows(x: Tensor) -> Tensor:
    """`(..., width)` as a matrix whose rows are contiguous; they may lie apart."""
    x = x.detach()
    x = x[None] if x.dim() == 1 else x.flatten(0, -2)
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def pieces(n: int, grain: int) -> list[range]:
    """Ranges that make up `range(n)`, one for each thread, cut at `grain`."""
    if n == 0:
        return []
    threads = min(torch.get_num_threads(), -(-n // grain))
    step = -(-n // (threads * grain)) * grain
    return [range(i, min(i + step, n)) for i in range(0, n, step)]


def in_pieces(work: Callable[[range], None], n: int, grain: int) -> None:
    """Call `work` on the [`pieces`] of `range(n)`, each in a thread of its own."""
    map_pieces(work, pieces(n, grain))


def map_pieces(work: Callable[[Piece], Result], pieces: Sequence[Piece]) -> list[Result]:
    """`[work(piece) for piece in pieces]` on as many threads as torch computes with.

    For calls that let go of Python's lock while they compute, as those of C and numpy do.
    """
    threads = min(torch.get_num_threads(), len(pieces))
    if threads <= 1 or getattr(_within, "pieces", False):
        return [work(piece) for piece in pieces]
    if threads not in _pools:
        _pools[threads] = ThreadPoolExecutor(threads)

    def alone(piece: Piece) -> Result:
        """Nothing of it is shared among threads again: all are busy, and would wait for ever."""
        _within.pieces = True
        try:
            return work(piece)
        finally:
            _within.pieces = False

    return list(_pools[threads].map(alone, pieces))


_within = threading.local()
