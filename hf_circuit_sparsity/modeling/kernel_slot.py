"""The slot into which the package around this folder puts its compiled CPU kernels.

This folder travels to the Hub and runs there on torch and numpy alone; nothing is compiled for a
model that is only loaded. With the package installed `kernels/` fills the slot, and the operations
of this folder ask it first.
"""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


def _installed_kernels() -> Any:
    try:
        load = importlib.import_module("hf_circuit_sparsity.kernels").load_kernels
    except ImportError:
        load = None
    fill_slot(load)
    return load and load()


_load: Callable[[], Any] | None = _installed_kernels


def fill_slot(load: Callable[[], Any] | None) -> None:
    """Say where kernels come from.

    Args:
        load: gives the kernels, or None where there are none; called when first needed. None
            empties the slot.
    """
    global _load
    _load = load


@contextmanager
def without_kernels() -> Iterator[None]:
    """Within it, everything runs on torch and numpy; for tests and comparisons."""
    filled = _load
    fill_slot(None)
    try:
        yield
    finally:
        fill_slot(filled)


def kernels_for(*tensors: torch.Tensor) -> Any:
    """The kernels, if there are some and they can work on these: plain float32 tensors on the CPU.

    Everything a kernel returns is without gradient; who asks for it takes care of that.
    """
    if _load is None or torch.compiler.is_compiling():
        return None
    for x in tensors:
        if x.dtype != torch.float32 or x.device.type != "cpu":
            return None
        if type(x) not in (torch.Tensor, torch.nn.Parameter):  # fake or distributed
            return None
        if torch._C._functorch.is_functorch_wrapped_tensor(x):  # within torch.func
            return None
    return _load()
