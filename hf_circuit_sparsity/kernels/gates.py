"""Gates on nodes, and their gradients in one pass."""

import ctypes
from typing import Any

import torch
from torch import Tensor

from .calling import PIECE, Library, Shared

# Rows whose gradients are summed in one go; the same for any number of threads.
_ROWS = 256


class GateKernels(Library):
    """Kernels of gates.c."""

    def __init__(self, library: ctypes.CDLL):
        super().__init__(library)
        self._gate_rows = Shared(library, "gate_rows")
        self._gate_gradients = Shared(library, "gate_gradients")

    def differentiable_gates(self, x: Tensor, gates: Tensor, mean: Tensor) -> Tensor:
        """`mean + gate * (x - mean)` with gradients for `x` and the gates.

        Args:
            x: `(k, rows, width)`.
            gates: `(k, width)`; every one is for as many rows.
            mean: `(width,)`.
        """
        return _Gates.apply(x, gates, mean, self)

    def gate(self, x: Tensor, gates: Tensor, mean: Tensor) -> Tensor:
        """[`differentiable_gates`] without gradients."""
        x, gates, mean = (t.detach().contiguous() for t in (x, gates, mean))
        centers, out = mean * (1 - gates), torch.empty(x.shape)
        k, rows, width = x.shape
        step = max(1, PIECE // width)

        def arguments(i: int, part: range) -> tuple[int, ...]:
            at = 4 * (i * rows + part.start) * width
            return (
                x.data_ptr() + at, len(part), width, gates.data_ptr() + 4 * i * width,
                centers.data_ptr() + 4 * i * width, out.data_ptr() + at,
            )  # fmt: skip

        self._gate_rows([arguments(i, part) for i, part in _cut(k, rows, step)])
        return out

    def gate_gradients(self, grad: Tensor, x: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
        """Of the sum of `grad * out`: the gradient of `x`, and for every gate the sums over rows of
        `grad * x` and of `grad`, `(k, 2, width)`."""
        grad, x, gates = (t.detach().contiguous() for t in (grad, x, gates))
        k, rows, width = x.shape
        pieces = _cut(k, rows, _ROWS)
        dx, sums = torch.empty(x.shape), torch.empty(len(pieces), 2, width)

        def arguments(number: int, i: int, part: range) -> tuple[int, ...]:
            at = 4 * (i * rows + part.start) * width
            return (
                grad.data_ptr() + at, x.data_ptr() + at, len(part), width,
                gates.data_ptr() + 4 * i * width, dx.data_ptr() + at,
                sums.data_ptr() + 8 * number * width,
            )  # fmt: skip

        self._gate_gradients([arguments(number, *piece) for number, piece in enumerate(pieces)])
        return dx, sums.view(k, -1, 2, width).sum(1)


def _cut(k: int, rows: int, step: int) -> list[tuple[int, range]]:
    return [(i, range(j, min(j + step, rows))) for i in range(k) for j in range(0, rows, step)]


class _Gates(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gates: Tensor, mean: Tensor, kernels: GateKernels) -> Tensor:
        ctx.kernels = kernels
        ctx.save_for_backward(x, gates, mean)
        return kernels.gate(x, gates, mean)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gates, mean = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated again
            return grad * gates[:, None], (grad * (x - mean)).sum(1), None, None
        dx, sums = ctx.kernels.gate_gradients(grad, x, gates)
        return dx, sums[:, 0] - mean * sums[:, 1], None, None
