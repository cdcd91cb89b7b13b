"""Linear layers of a model in training that multiply only nonzeros: of weights, or of activations.

Top-k AdamW keeps dense weights and moments, because any entry may come back; but once few weights
are left, forward and input gradient need these alone. The gradient of the weight stays dense: it
decides which entries grow back. AbsTopK helps there, and while the weights are still dense: it
leaves a quarter of the activations at a layer's input, and of the gradients at its output, so that
each of the three products of a layer has an operand with many zeros.

Within [`on_nonzeros`] every `nn.Linear` runs that way where it pays, and as ever elsewhere.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from ..kernels.cpu import CpuKernels, compiled_kernels
from ..modeling.sparse_layers import sparse_matmul

# Up to this share of nonzero weights products with them are faster. On a CPU in float32 a
# 4096 × 1024 layer with 256 tokens takes a twentieth of the dense time at 1/64, a third at 1/8, all
# of it at 1/3 (`benchmarks.sparse_execution`); finding the nonzeros adds to that.
MAX_DENSITY = 1 / 10
# The like for nonzero activations, which takes the compiled kernels: at a quarter the product takes
# half of the dense time, at a half all of it (`benchmarks.training_step`).
MAX_ACTIVE = 0.4
# A product below so many multiplications is faster as it is: with the kernels, and without them.
_MIN_WORK = 1 << 24
_MIN_WORK_WITHOUT_KERNELS = 1 << 26


class NonzeroLinear(nn.Linear):
    """`nn.Linear` with the same parameters that multiplies nonzeros if they are few.

    It looks for them in every pass. That is a hundredth of the work, and nothing that changes the
    weight, in whichever way, can go unnoticed.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kernels = compiled_kernels(x, self.weight)
        if not self._may_be_sparse(x, kernels):
            return F.linear(x, self.weight, self.bias)
        weight = _Nonzeros.of(self.weight.detach(), kernels)
        if weight is None and kernels is None:
            return F.linear(x, self.weight, self.bias)
        return _LinearOnNonzeros.apply(x, self.weight, self.bias, weight, kernels)

    def _may_be_sparse(self, x: torch.Tensor, kernels: CpuKernels | None) -> bool:
        enough = _MIN_WORK_WITHOUT_KERNELS if kernels is None else _MIN_WORK
        return (
            x.device.type == "cpu"
            and x.dtype == self.weight.dtype
            and x.dtype in (torch.float32, torch.float64)
            and x.numel() * self.out_features >= enough
            and (kernels is not None or torch.backends.mkl.is_available())
            and not torch.is_autocast_enabled("cpu")
            and not torch.compiler.is_compiling()
        )


class _Nonzeros:
    """A matrix by its nonzeros row by row, and the like for its transpose."""

    def __init__(
        self, row_starts: torch.Tensor, columns: torch.Tensor, values: torch.Tensor, width: int
    ):
        self.row_starts, self.columns, self.values = row_starts, columns, values
        self.rows, self.width = len(row_starts) - 1, width

    @classmethod
    def of(cls, weight: torch.Tensor, kernels: CpuKernels | None) -> "_Nonzeros | None":
        """None if there are too many for this to pay."""
        if kernels is not None:
            found = kernels.compress(weight, MAX_DENSITY)
            return found and cls(found.row_starts, found.columns, found.values, found.width)
        kept = (weight != 0).view(-1).numpy()
        if np.count_nonzero(kept) > MAX_DENSITY * kept.size:
            return None
        flat = np.flatnonzero(kept)
        row, column = np.divmod(flat, weight.shape[1])
        values = weight.reshape(-1)[torch.from_numpy(flat)]
        columns = torch.from_numpy(column.astype(np.int32))
        return cls(_starts(row, len(weight)), columns, values, weight.shape[1])

    def times(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """`x @ weight.T + bias`."""
        return sparse_matmul(x, self.row_starts, self.columns, self.values, self.rows, bias)

    def transposed(self, kernels: CpuKernels | None) -> "_Nonzeros":
        """The transposed matrix."""
        if kernels is not None:
            turned = kernels.transpose(self)
            return _Nonzeros(turned.row_starts, turned.columns, turned.values, turned.width)
        column = self.columns.numpy()
        # Sorting 16-bit numbers takes numpy a fraction of the time.
        small = column.astype(np.uint16) if self.width <= 1 << 16 else column
        order = np.argsort(small, kind="stable")
        row = np.repeat(np.arange(self.rows, dtype=np.int32), np.diff(self.row_starts.numpy()))
        columns, values = torch.from_numpy(row[order]), self.values[torch.from_numpy(order)]
        return _Nonzeros(_starts(column, self.width), columns, values, self.rows)


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
        nonzeros: _Nonzeros | None,
        kernels: CpuKernels | None,
    ) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        ctx.nonzeros, ctx.kernels, ctx.shape = nonzeros, kernels, x.shape
        if nonzeros is not None:
            ctx.save_for_backward(flat)
            y = nonzeros.times(flat, bias)
        else:
            ctx.save_for_backward(flat, weight)
            y = product(flat, weight, kernels, transpose=True)
            if bias is not None:
                y += bias
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, *weight = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            if ctx.nonzeros is not None:
                grad_x = ctx.nonzeros.transposed(ctx.kernels).times(grad)
            else:
                grad_x = product(grad, weight[0], ctx.kernels)
            grad_x = grad_x.view(ctx.shape)
        if ctx.needs_input_grad[1]:
            grad_weight = weight_gradient(grad, x, ctx.kernels)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum(0)
        return grad_x, grad_weight, grad_bias, None, None


def product(
    x: torch.Tensor, weight: torch.Tensor, kernels: CpuKernels | None, transpose: bool = False
) -> torch.Tensor:
    """`x @ weight`, or `x @ weight.T`, on the nonzeros of `x` if they are few."""
    if kernels is not None and (active := kernels.list_nonzeros(x, MAX_ACTIVE)):
        return kernels.product(active, weight, transpose)
    return x @ (weight.t() if transpose else weight)


def weight_gradient(
    grad: torch.Tensor, x: torch.Tensor, kernels: CpuKernels | None
) -> torch.Tensor:
    """`grad.T @ x`, on the nonzeros of whichever has few."""
    if kernels is not None:
        if active := kernels.list_nonzeros(grad, MAX_ACTIVE, transpose=True):
            return kernels.product(active, x)
        if active := kernels.list_nonzeros(x, MAX_ACTIVE, transpose=True):
            return kernels.product(active, grad).t().contiguous()
    return grad.t() @ x


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
