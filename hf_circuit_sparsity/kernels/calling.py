"""What the wrappers of all kernels share: calling C, and splitting work among threads."""

import ctypes
import functools
import os
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
    """`[work(piece) for piece in pieces]` on the threads that torch computes with.

    For calls that let go of Python's lock while they compute, as those of C and numpy do. Where
    torch's OpenMP can be asked, they are its own threads: they are awake after torch's last
    operation, and threads beside them would wait for a core that these hold while they spin.
    """
    threads = min(torch.get_num_threads(), len(pieces))
    if threads <= 1:
        return [work(piece) for piece in pieces]
    parallel = None if _forked else _openmp()
    if parallel is None:
        if threads not in _pools:
            _pools[threads] = ThreadPoolExecutor(threads)
        return list(_pools[threads].map(work, pieces))
    results: list[Result | None] = [None] * len(pieces)
    errors: list[BaseException] = []
    left = iter(enumerate(pieces))  # whichever thread is free takes the next

    def take(_: int | None) -> None:
        try:
            for i, piece in left:
                results[i] = work(piece)
        except BaseException as error:  # C cannot pass it on
            errors.append(error)

    parallel(_BODY(take), None, threads, 0)
    if errors:
        raise errors[0]
    return results  # type: ignore[return-value]


_BODY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@functools.cache
def _openmp() -> Callable[..., None] | None:
    """`GOMP_parallel` of the OpenMP that torch has loaded, which runs a function on a number of its
    threads; None where it has another, as on macOS."""
    try:
        parallel = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):
        return None
    parallel.argtypes = [_BODY, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    return parallel
