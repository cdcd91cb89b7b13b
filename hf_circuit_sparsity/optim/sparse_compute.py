"""Linear layers of a model in training that multiply only nonzeros: of weights, or of activations.

Top-k AdamW keeps dense weights and moments, because any entry may come back. But once few weights
are left, the forward pass and the gradient of the input need these alone. The gradient of the
weight stays dense: it decides which entries grow back. AbsTopK helps there, and while the weights
are still dense: it leaves a quarter of the activations at a layer's input, and of the gradients at
its output, so that each of the three products of a layer has an operand with many zeros.

Within [`on_nonzeros`] every `nn.Linear` and `Conv1D` runs that way where it pays.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..kernels.cpu import CpuKernels, compiled_kernels
from ..modeling.causal_lm import TRANSPOSED_LAYERS
from ..modeling.csr import CSR

# Up to this share of nonzero weights products with them are faster. On a CPU in float32 a
# 4096 × 1024 layer with 256 tokens takes a twentieth of the dense time at 1/64, a third at 1/8, all
# of it at 1/3 (`benchmarks/speed/sparse_execution.py`); finding the nonzeros adds to that.
MAX_DENSITY = 1 / 10
# The same for nonzero activations, which takes the compiled kernels: at a quarter the product takes
# half of the dense time, at a half all of it (`benchmarks/speed/training_step.py`).
MAX_ACTIVE = 0.4
# A product below so many multiplications is faster as it is: with the kernels, and without them.
_MIN_WORK = 1 << 24
_MIN_WORK_WITHOUT_KERNELS = 1 << 26


class ReplacedForwards:
    """Layers whose forward pass is another one until `close()`, or within a `with` block.

    Layers keep their identity, class, parameters, names and hooks. Copies and pickles of a layer
    have its own forward pass.

    Args:
        layers: a layer that has another forward pass already keeps that.
        make: the forward pass of a layer.
    """

    def __init__(
        self, layers: Iterable[nn.Module], make: Callable[[nn.Module], Callable[..., Tensor]]
    ) -> None:
        self.layers = [layer for layer in layers if "forward" not in layer.__dict__]
        for layer in self.layers:
            layer.forward = make(layer)
            layer.__dict__["__reduce_ex__"] = partial(_reduce_to_itself, layer)

    def close(self) -> None:
        """Give the layers back their own forward and backward passes. Idempotent."""
        for layer in self.layers:
            for name in _REPLACED:
                layer.__dict__.pop(name, None)
        self.layers = []

    def __enter__(self) -> "ReplacedForwards":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


_REPLACED = ("forward", "__reduce_ex__")


def _reduce_to_itself(layer: nn.Module, protocol: int) -> tuple:
    """What copies and pickles a layer, without the forward pass that was put into it."""
    make, arguments, state, *others = type(layer).__reduce_ex__(layer, protocol)
    state = {name: value for name, value in state.items() if name not in _REPLACED}
    return make, arguments, state, *others


def on_nonzeros(model: nn.Module) -> ReplacedForwards:
    """Within it, the linear layers of `model` multiply nonzeros where that is faster.

    It is faster on the CPU in float32 or float64; elsewhere, under autocast and under
    `torch.compile` the layers compute as they are.
    """
    linears = [module for module in model.modules() if type(module) in (nn.Linear, Conv1D)]
    return ReplacedForwards(linears, NonzeroForward)


class LinearForward:
    """The forward pass of a linear layer, whose three products may leave out zeros.

    Args:
        layer: stores its weight outputs × inputs, or the other way round (`transposed`).
    """

    def __init__(self, layer: nn.Module) -> None:
        self.layer, self.transposed = layer, isinstance(layer, TRANSPOSED_LAYERS)

    def kernels(self, x: Tensor, weight: Tensor) -> CpuKernels | None:
        """The kernels that multiply nonzeros of activations; None to do without."""
        return compiled_kernels(x, weight)

    def weight_gradient(self, left: Tensor, right: Tensor) -> Tensor | None:
        """The weight's gradient, `left.T @ right`, or None where it goes elsewhere."""
        return weight_gradient(left, right, compiled_kernels(left, right))

    def differentiable_gradients(
        self, x: Tensor, weight: Tensor, grad: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The gradients of input and weight by torch's own products."""
        if self.transposed:
            return grad @ weight.t(), x.t() @ grad
        return grad @ weight, grad.t() @ x

    def linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, nonzeros: CSR | None
    ) -> Tensor:
        """`x @ weight.T + bias`, for inputs of any shape.

        Args:
            nonzeros: the weight by its nonzeros; None to multiply it as it is.
        """
        y = _LinearFunction.apply(x.reshape(-1, x.shape[-1]), weight, nonzeros, self)
        if bias is not None:
            y += bias.to(y.dtype)
        return y.view(*x.shape[:-1], y.shape[-1])


class _LinearFunction(torch.autograd.Function):
    """`x @ weight.T`, without bias; `x` is `(tokens, in_features)`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, nonzeros: CSR | None, use: LinearForward
    ) -> Tensor:
        ctx.use, ctx.nonzeros = use, nonzeros
        ctx.save_for_backward(x, weight)
        with torch.autocast(x.device.type, enabled=False):
            return _multiply(ctx, x, weight, transpose=not use.transposed)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated again
            return *ctx.use.differentiable_gradients(x, weight, grad), None, None
        use, grad_x, grad_weight = ctx.use, None, None
        with torch.autocast(x.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                grad_x = _multiply(ctx, grad, weight, transpose=use.transposed)
            if ctx.needs_input_grad[1]:
                left, right = (x, grad) if use.transposed else (grad, x)
                grad_weight = use.weight_gradient(left, right)
        return grad_x, grad_weight, None, None


def _multiply(ctx: Any, x: Tensor, weight: Tensor, transpose: bool) -> Tensor:
    """`x @ weight`, or `x @ weight.T`, with the weight as stored."""
    if ctx.nonzeros is not None:
        return ctx.nonzeros.linear(x) if transpose else ctx.nonzeros.transposed().linear(x)
    weight = weight.to(x.dtype)
    return product(x, weight, ctx.use.kernels(x, weight), transpose)


class NonzeroForward(LinearForward):
    """The forward pass of an `nn.Linear` or `Conv1D` that multiplies nonzeros if they are few.

    It looks for them in every pass. The scan costs about 1 % of the product, and no weight update
    can be missed.
    """

    def __call__(self, x: Tensor) -> Tensor:
        weight, bias = self.layer.weight, self.layer.bias
        kernels = compiled_kernels(x, weight)
        if self._pays(x, kernels):
            nonzeros = few_nonzeros(weight)
            if nonzeros is not None or kernels is not None:
                return self.linear(x, weight, bias, nonzeros)
        return type(self.layer).forward(self.layer, x)

    def _pays(self, x: Tensor, kernels: CpuKernels | None) -> bool:
        weight = self.layer.weight
        enough = _MIN_WORK_WITHOUT_KERNELS if kernels is None else _MIN_WORK
        return (
            x.device.type == "cpu"
            and x.dtype == weight.dtype
            and x.dtype in (torch.float32, torch.float64)
            and x.numel() * weight.shape[1 if self.transposed else 0] >= enough
            and (kernels is not None or torch.backends.mkl.is_available())
            and not torch.is_autocast_enabled("cpu")
            and not torch.compiler.is_compiling()
        )


def few_nonzeros(weight: Tensor) -> CSR | None:
    """The nonzeros of a matrix; None if they are more than pays to multiply alone."""
    if kernels := compiled_kernels(weight):
        parts = kernels.nonzeros(weight.detach(), int(MAX_DENSITY * weight.numel()))
        return None if parts is None else CSR(*parts, weight.shape[1])
    few = torch.count_nonzero(weight) <= MAX_DENSITY * weight.numel()
    return CSR.from_dense(weight) if few else None


def product(
    x: Tensor, weight: Tensor, kernels: CpuKernels | None, transpose: bool = False
) -> Tensor:
    """`x @ weight`, or `x @ weight.T`, on the nonzeros of `x` if they are few."""
    if kernels is not None and (active := kernels.list_nonzeros(x, MAX_ACTIVE)):
        return kernels.product(active, weight, transpose)
    return x @ (weight.t() if transpose else weight)


def weight_gradient(grad: Tensor, x: Tensor, kernels: CpuKernels | None) -> Tensor:
    """`grad.T @ x`, on the nonzeros of whichever has few."""
    if kernels is not None:
        if active := kernels.list_nonzeros(grad, MAX_ACTIVE, transpose=True):
            return kernels.product(active, x)
        if active := kernels.list_nonzeros(x, MAX_ACTIVE, transpose=True):
            return kernels.product(active, grad).t().contiguous()
    return grad.t() @ x
