"""Linear layers of a model in training that multiply only the nonzeros of their weight.

Top-k AdamW keeps dense weights and moments, because any entry may come back; but forward and
input gradient need the nonzeros alone. Within [`on_nonzeros`] every `nn.Linear` runs that way once
its weight is sparse enough for it to pay, and as ever before that. The gradient of the weight stays
dense: it decides which entries grow back.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from ..modeling.sparse_linear import sparse_matmul

# Up to this share of nonzeros, and from so many tokens and entries on, the nonzeros are faster. On
# a CPU in float32 a 4096 × 1024 layer with 256 tokens takes a sixth of the dense time at 1/64, half
# of it at 1/8, all of it at 1/4 (`benchmarks.sparse_execution`); finding the nonzeros adds to that.
MAX_DENSITY = 1 / 10
_MIN_ENTRIES = 1 << 18
_MIN_TOKENS = 32


class NonzeroLinear(nn.Linear):
    """`nn.Linear` with the same parameters that multiplies its nonzeros if they are few.

    It looks for them in every forward pass. That is a hundredth of the work, and nothing that
    changes the weight, in whichever way, can go unnoticed.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        nonzeros = _Nonzeros.of(self.weight.detach()) if self._may_be_sparse(x) else None
        if nonzeros is None:
            return F.linear(x, self.weight, self.bias)
        return _LinearOnNonzeros.apply(x, self.weight, self.bias, nonzeros)

    def _may_be_sparse(self, x: torch.Tensor) -> bool:
        return (
            x.device.type == "cpu"
            and x.dtype == self.weight.dtype
            and x.dtype in (torch.float32, torch.float64)
            and self.weight.numel() >= _MIN_ENTRIES
            and x.numel() >= _MIN_TOKENS * self.in_features
            and torch.backends.mkl.is_available()
            and not torch.is_autocast_enabled("cpu")
            and not torch.compiler.is_compiling()
        )


class _Nonzeros:
    """A matrix by its nonzeros, and the like for its transpose."""

    def __init__(self, flat: np.ndarray, weight: torch.Tensor):
        self.rows, self.width = weight.shape
        self.row, self.column = np.divmod(flat, self.width)
        self.values = weight.reshape(-1)[torch.from_numpy(flat)]

    @classmethod
    def of(cls, weight: torch.Tensor) -> "_Nonzeros | None":
        """None if there are too many for this to pay."""
        kept = (weight != 0).view(-1).numpy()
        if np.count_nonzero(kept) > MAX_DENSITY * kept.size:
            return None
        return cls(np.flatnonzero(kept), weight)

    def times(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """`x @ weight.T + bias`."""
        columns = torch.from_numpy(self.column.astype(np.int32))
        starts = _starts(self.row, self.rows)
        return sparse_matmul(x, starts, columns, self.values, self.rows, bias)

    def transpose_times(self, grad: torch.Tensor) -> torch.Tensor:
        """`grad @ weight`."""
        # Sorting 16-bit numbers takes numpy a fraction of the time.
        small = self.column.astype(np.uint16) if self.width <= 1 << 16 else self.column
        order = np.argsort(small, kind="stable")
        columns = torch.from_numpy(self.row[order].astype(np.int32))
        values = self.values[torch.from_numpy(order)]
        return sparse_matmul(grad, _starts(self.column, self.width), columns, values, self.width)


def _starts(row: np.ndarray, rows: int) -> torch.Tensor:
    starts = np.zeros(rows + 1, np.int32)
    starts[1:] = np.bincount(row, minlength=rows).cumsum()
    return torch.from_numpy(starts)


class _LinearOnNonzeros(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        nonzeros: _Nonzeros,
    ) -> torch.Tensor:
        flat = x.reshape(-1, nonzeros.width)
        ctx.save_for_backward(flat)
        ctx.nonzeros, ctx.shape = nonzeros, x.shape
        return nonzeros.times(flat, bias).view(*x.shape[:-1], nonzeros.rows)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        nonzeros = ctx.nonzeros
        grad = grad.reshape(-1, nonzeros.rows)
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = nonzeros.transpose_times(grad).view(ctx.shape)
        if ctx.needs_input_grad[1]:
            grad_weight = grad.t() @ x
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum(0)
        return grad_x, grad_weight, grad_bias, None


@contextmanager
def on_nonzeros(model: nn.Module) -> Iterator[None]:
    """Within it, the linear layers of `model` multiply nonzeros where that is faster.

    Layers keep their identity, parameters, names and hooks; only how they compute changes. It is
    faster on the CPU in float32 or float64; elsewhere, under autocast and under `torch.compile`
    everything is computed as ever.
    """
    changed = [m for m in model.modules() if type(m) is nn.Linear]
    for module in changed:
        module.__class__ = NonzeroLinear
    try:
        yield
    finally:
        for module in changed:
            module.__class__ = nn.Linear
