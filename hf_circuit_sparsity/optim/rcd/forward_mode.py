"""Derivatives along chosen coordinates without a backward pass, by forward-mode differentiation.

One derivative costs about two forward passes and stores no activations. So this pays for few
coordinates, or where memory is short; for many, see [`PartialGradients`].
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp

from .optimizer import RCDSparseOptimizer

Loss = Callable[[nn.Module], Tensor]


def directional_derivative(
    model: nn.Module, loss: Loss, direction: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """The loss, and its derivative when parameters move along a direction (`torch.func.jvp`).

    Nothing is saved for a backward pass. Attention runs in its readable form meanwhile (the fused
    kernels know no forward mode). Dropout makes every call's loss another one: use `eval()`.

    Args:
        model: any module; must not be attached to [`PartialGradients`].
        loss: computes the loss, a scalar, from the model, for example
            `lambda model: model(**batch).loss`.
        direction: parameter name → tensor of its shape.

    Returns:
        Loss and derivative, both scalars.

    Raises:
        ValueError: if a name is not one of the model's parameters, or a shape is not its own.
    """
    names, parameters = list(direction), dict(model.named_parameters())
    for name, tangent in direction.items():
        if name not in parameters or tangent.shape != parameters[name].shape:
            known = parameters[name].shape if name in parameters else "no such parameter"
            raise ValueError(
                f"the direction {name!r} has shape {tuple(tangent.shape)}, the model has {known}: "
                "pass names of model.named_parameters() with tensors of their shapes."
            )
    called = _Called(model, loss)

    def at(*values: Tensor) -> Tensor:
        moved = {f"model.{name}": value for name, value in zip(names, values, strict=True)}
        return functional_call(called, moved, ())

    start = tuple(parameters[name].detach() for name in names)
    with torch.no_grad(), _eager_attention(model):
        tangents = tuple(direction[name].to(p) for name, p in zip(names, start, strict=True))
        return jvp(at, start, tangents)


def coordinate_derivatives(
    model: nn.Module, loss: Loss, coordinates: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Partial derivatives of the loss, one [`directional_derivative`] each.

    Args:
        coordinates: parameter name → flat positions in it, `(n,)` int64.

    Returns:
        Parameter name → derivatives, `(n,)` in the parameter's dtype.
    """
    parameters = dict(model.named_parameters())
    found = {}
    for name, index in coordinates.items():
        direction = torch.zeros_like(parameters[name].detach())
        derivatives = direction.new_empty(len(index))
        for place, position in enumerate(index.tolist()):
            direction.view(-1)[position] = 1.0
            derivatives[place] = directional_derivative(model, loss, {name: direction})[1]
            direction.view(-1)[position] = 0.0
        found[name] = derivatives
    return found


def add_forward_gradients(model: nn.Module, optimizer: RCDSparseOptimizer, loss: Loss) -> None:
    """Give the optimizer the gradients of its next step, without a backward pass.

    Costs one [`directional_derivative`] for every coordinate of the current blocks and, with
    `move_active`, for every active one; of dense parameters it computes none, so these stay.

    Args:
        optimizer: of parameters of `model`.
        loss: as of [`directional_derivative`].
    """
    names = {p: name for name, p in model.named_parameters()}
    for _, p in optimizer.sparse_parameters():
        state, name = optimizer.sparse_state(p), names[p]
        block = coordinate_derivatives(model, loss, {name: state.own_block.index()})[name]
        active = None
        if state.move_active:
            # Those in the block are known by now.
            inside, index = state.active_in_block
            outside = state.active[~inside]
            active = block.new_empty(len(inside))
            active[inside] = block[index]
            active[~inside] = coordinate_derivatives(model, loss, {name: outside})[name]
        state.add_gradient(active, block)


class _Called(nn.Module):
    """Makes the loss a function of the model's parameters."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self) -> Tensor:
        return self.loss(self.model)


@contextmanager
def _eager_attention(model: nn.Module) -> Iterator[None]:
    switch = getattr(model, "set_attn_implementation", None)
    before = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if switch is None or before in (None, "eager"):
        yield
        return
    switch("eager")
    try:
        yield
    finally:
        switch(before)
