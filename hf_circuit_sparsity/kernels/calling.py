"""What the wrappers of all kernels share: calling C, and splitting work among threads."""

import ctypes
import functools
import os
import struct
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

LANES = 16  # as in lanes.h, where vectors are widest
PIECE = 1 << 16  # entries worth a thread of their own

Piece = TypeVar("Piece")
Result = TypeVar("Result")

_pools: dict[int, ThreadPoolExecutor] = {}
_forked = False


def _after_fork() -> None:
    """Threads do not survive a fork: a pool, ours or OpenMP's, would wait for them for ever."""
    global _forked
    _forked = True
    _pools.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


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


class Shared:
    """A kernel that is called for several pieces of one work, each by a thread.

    The threads are those of the OpenMP that torch computes with, where that can be asked. Python
    has no part in it, so that nobody waits for its lock.

    Args:
        library: with `share` of share.c.
        name: of a kernel for which there is a wrapper by `SHARED` of lanes.h.
    """

    def __init__(self, library: ctypes.CDLL, name: str):
        self._kernel = ctypes.cast(getattr(library, f"{name}_shared"), ctypes.c_void_p).value
        self._share = declare(library.share, "ppiipi")

    def __call__(self, pieces: Sequence[Sequence[int]]) -> np.ndarray:
        """Call it once for each piece.

        Args:
            pieces: the arguments of each: numbers, addresses (0 for none), [`float_bits`].

        Returns:
            The arguments, `(pieces, arguments)` int64; a kernel may write its result over one.
        """
        if not pieces:
            return np.empty((0, 0), np.int64)
        arguments = np.array(pieces, np.int64)
        at, (count, width) = arguments.ctypes.data, arguments.shape
        threads = 1 if getattr(_within, "pieces", False) else min(torch.get_num_threads(), count)
        parallel = None if _forked else _openmp()
        if threads <= 1 or parallel is not None:
            self._share(self._kernel, at, count, width, parallel, threads)
        else:
            one = functools.partial(self._share, self._kernel)
            map_pieces(lambda i: one(at + 8 * i * width, 1, width, None, 1), range(count))
        return arguments


def float_bits(x: float) -> int:
    """The bits of a float32, as [`Shared`] passes one."""
    return struct.unpack("<i", struct.pack("<f", x))[0]


@functools.cache
def _openmp() -> int | None:
    """Where `GOMP_parallel` of the OpenMP is that torch has loaded; None if it has another."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value
    except (AttributeError, OSError, TypeError):
        return None


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
