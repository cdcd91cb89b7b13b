"""Backward passes that compute a weight's gradient only where the optimizer uses it.

`y = x @ W.T` has the weight gradient `dY.T @ X`. For a block of output rows R it is
`dY[:, R].T @ X`, for a block of columns C it is `dY.T @ X[:, C]`, and at scattered coordinates
a sampled product; none needs the rest. `y` and `dX` need the nonzeros of `W` only.
"""

from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from ...kernels.cpu import CpuKernels, compiled_kernels
from ...modeling.causal_lm import SparseConv1D
from ...modeling.csr import CSR
from ...modeling.sparse_layers import SparseEmbedding, SparseLinear, SparseWeight
from ..param_groups import trained_weight
from ..settings import check, is_fraction
from ..sparse_compute import MAX_DENSITY, LinearForward, ReplacedForwards, weight_gradient
from .blocks import Block
from .optimizer import RCDSparseOptimizer
from .state import SparseState

# Entries of a dense product held at a time where there is no kernel for a sampled one.
_PIECE = 1 << 20


class PartialGradients(ReplacedForwards):
    """Lets the layers of a model hand an [`RCDSparseOptimizer`] the gradients it will use.

    While attached, `nn.Linear`, transformers' `Conv1D` and `nn.Embedding` layers, and those
    that [`to_sparse`] puts in their place, whose weight is one of the optimizer's sparse parameters
    compute its gradient at the active coordinates and in the current
    block, add it to what the optimizer holds for its next step, and leave `.grad` of the weight
    None. The full gradient never exists. Their forward passes and input gradients run on the active
    coordinates where these are few. Everything else (biases, norms, other modules) has an ordinary
    `.grad`; so has a weight that is also used outside of such layers, for that use, and the
    optimizer adds the two. Layers that share a weight add up.

    As the block stays until the optimizer's step, gradients of several backward passes accumulate.
    The gradient of an embedding is first summed over equal tokens of the batch, which takes no more
    memory than the layer's output.

    Works with autocast, gradient checkpointing and frozen parameters. It does not work with
    `torch.func`, nor with a `GradScaler` (float16), which scales `.grad` only.

    Use it as a context manager, or call [`close`] to give the layers back their own methods::

        with PartialGradients(model, optimizer):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    Args:
        model: any module.
        optimizer: may be wrapped by Accelerate.
        threshold: layers with at most this share of active coordinates run on them, in [0, 1].
        min_entries: weights with fewer entries are multiplied as they are in any case.
        exclude_parameters: names of sparse parameters, not the weight of any such layer, that may
            be given a full gradient.

    Raises:
        TypeError: if the optimizer is of another kind.
        ValueError: if the model has no layer to attach to, or some sparse parameter with more than
            one dimension is not the weight of one.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        *,
        threshold: float = MAX_DENSITY,
        min_entries: int = 1 << 16,
        exclude_parameters: tuple[str, ...] | list[str] = (),
    ) -> None:
        inner = getattr(optimizer, "optimizer", optimizer)
        if not isinstance(inner, RCDSparseOptimizer):
            raise TypeError(
                f"the optimizer is a {type(inner).__name__}, expected RCDSparseOptimizer: others "
                "need the full gradient."
            )
        check("threshold", threshold, is_fraction(threshold), "a share of nonzeros in [0, 1]")
        sparse = {id(p): p for _, p in inner.sparse_parameters()}
        layers = [m for m in model.modules() if _supported(m) and id(trained_weight(m)) in sparse]
        if not layers:
            raise ValueError(
                f"{type(model).__name__} has no nn.Linear, Conv1D or nn.Embedding whose weight is "
                "a sparse parameter of the optimizer: build the optimizer from this model's "
                "parameters, or use it without PartialGradients."
            )
        covered = {id(trained_weight(m)) for m in layers}
        names = {id(p): name for name, p in model.named_parameters()}
        bare = [names.get(i, "one of another model") for i, p in sparse.items()
                if i not in covered and p.ndim > 1]  # fmt: skip
        bare = [name for name in bare if name not in exclude_parameters]
        if bare:
            raise ValueError(
                f"no rule covers the sparse parameters {', '.join(bare)}: expected weights of "
                "nn.Linear, Conv1D or nn.Embedding; put them into a group with sparse=False, or "
                "name them in exclude_parameters to compute their full gradient."
            )
        inner.train_nonzeros(m for m in layers if isinstance(m, SparseWeight))

        def forward_of(layer: nn.Module) -> Any:
            if isinstance(layer, nn.Embedding | SparseEmbedding):
                return _EmbeddingForward(layer, inner)
            pays = isinstance(layer, SparseWeight) or layer.weight.numel() >= min_entries
            return _PartialForward(layer, inner, threshold if pays else -1.0)

        super().__init__(layers, forward_of)


def block_gradient(block: Block, left: Tensor, right: Tensor) -> Tensor:
    """`left.T @ right` in the block only, flat, in the block's order.

    Args:
        left: `(tokens, rows)`.
        right: `(tokens, width)`.
    """
    if block.dim is None:
        return gradient_at(CSR.from_positions(block.ids, block.shape), left, right)
    if block.dim == 0:
        left = left.index_select(1, block.ids)
    else:
        right = right.index_select(1, block.ids)
    if not len(block.ids):
        return left.new_empty(0)
    return weight_gradient(left, right, compiled_kernels(left, right)).flatten()


def gradient_at(pattern: CSR, left: Tensor, right: Tensor) -> Tensor:
    """`left.T @ right` at the coordinates of a pattern only, `(n,)` in at least float32.

    Args:
        left: `(tokens, rows)`.
        right: `(tokens, width)`.
    """
    dtype = torch.promote_types(left.dtype, torch.float32)
    left, right = left.to(dtype), right.to(dtype)
    rows, width = pattern.shape
    kernels = compiled_kernels(left, right)
    # A sampled product costs many times a dense product's price per entry, the more so where
    # activations are few.
    price = 8 if kernels is None else 20
    on_device = left.device.type == "cuda"
    has_sampled = on_device or kernels is not None or torch.backends.mkl.is_available()
    if has_sampled and len(pattern) * price <= rows * width:
        return pattern.sampled(left, right)
    # Dense products of a few rows at a time, read at the coordinates.
    out = left.new_empty(len(pattern))
    step = max(1, _PIECE // max(1, width))
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        first, last = int(pattern.row_starts[start]), int(pattern.row_starts[stop])
        if first < last:
            piece = weight_gradient(left[:, start:stop], right, kernels)
            out[first:last] = piece.flatten()[pattern.positions[first:last] - start * width]
    return out


def _supported(module: nn.Module) -> bool:
    """Whether the layer does what we put in its place; a subclass may do something else."""
    own = type(module).forward
    if isinstance(module, SparseWeight):
        return own in (SparseLinear.forward, SparseConv1D.forward, SparseEmbedding.forward)
    if isinstance(module, nn.Embedding):
        plain = module.max_norm is None and not module.scale_grad_by_freq and not module.sparse
        return own is nn.Embedding.forward and plain
    if isinstance(module, nn.Linear):
        return own is nn.Linear.forward
    return isinstance(module, Conv1D) and own is Conv1D.forward


def refuse_second_derivatives() -> NoReturn:
    """Raise RuntimeError: a gradient that is known in part cannot be differentiated."""
    raise RuntimeError(
        "create_graph=True was passed within PartialGradients, which compute first derivatives of "
        "some coordinates: leave its `with` block, or close() it, for second derivatives."
    )


class _PartialForward(LinearForward):
    """The forward pass of a linear layer whose weight's gradient is computed in part."""

    def __init__(self, layer: nn.Module, optimizer: RCDSparseOptimizer, threshold: float) -> None:
        super().__init__(layer)
        self.optimizer = optimizer
        self.threshold = threshold

    def __call__(self, x: Tensor) -> Tensor:
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        weight = trained_weight(self.layer)
        return self.linear(x, weight, self.layer.bias, self._nonzeros(weight.detach()))

    def _nonzeros(self, weight: Tensor) -> CSR | None:
        pattern = self._state().pattern
        if isinstance(self.layer, SparseWeight):
            return pattern.with_values(weight)
        if len(pattern) > self.threshold * weight.numel():
            return None
        return pattern.with_values(weight.view(-1)[pattern.positions])

    def kernels(self, x: Tensor, weight: Tensor) -> CpuKernels | None:
        return super().kernels(x, weight) if self.threshold >= 0.0 else None

    def weight_gradient(self, left: Tensor, right: Tensor) -> None:
        state = self._state()
        active = gradient_at(state.own_pattern, left, right) if state.move_active else None
        state.add_gradient(active, block_gradient(state.own_block, left, right))

    def differentiable_gradients(self, x: Tensor, weight: Tensor, grad: Tensor) -> NoReturn:
        refuse_second_derivatives()

    def _state(self) -> SparseState:
        # By the layer's own parameter: what autograd saved is another object under checkpointing.
        return self.optimizer.sparse_state(trained_weight(self.layer))


class _EmbeddingForward:
    """The forward pass of a table whose gradient is computed in part."""

    def __init__(self, layer: nn.Module, optimizer: RCDSparseOptimizer) -> None:
        self.layer = layer
        self.optimizer = optimizer

    def __call__(self, ids: Tensor) -> Tensor:
        return _EmbeddingFunction.apply(ids, trained_weight(self.layer), self)


class _EmbeddingFunction(torch.autograd.Function):
    """A table's lookup."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, use: _EmbeddingForward) -> Tensor:
        ctx.use = use
        ctx.save_for_backward(ids)
        if isinstance(use.layer, SparseEmbedding):
            return type(use.layer).forward(use.layer, ids)
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
        if torch.is_grad_enabled():
            refuse_second_derivatives()
        if ctx.needs_input_grad[1]:
            (ids,) = ctx.saved_tensors
            layer = ctx.use.layer
            state = ctx.use.optimizer.sparse_state(trained_weight(layer))
            grad = grad.reshape(-1, layer.embedding_dim)
            grad = grad.to(torch.promote_types(grad.dtype, torch.float32))
            rows = _TokenGradient(ids.flatten(), grad, layer)
            active = rows.at(state.own_pattern.positions) if state.move_active else None
            state.add_gradient(active, rows.in_block(state.own_block))
        return None, None, None


class _TokenGradient:
    """A table's gradient, of which only the rows of the batch's tokens are not zero."""

    def __init__(self, ids: Tensor, grad: Tensor, layer: nn.Embedding) -> None:
        tokens, inverse = ids.unique(return_inverse=True)
        # A last row of zeros stands for all tokens that are not there.
        self.rows = grad.new_zeros(len(tokens) + 1, grad.shape[1]).index_add_(0, inverse, grad)
        self.number = torch.full((layer.num_embeddings,), len(tokens), device=ids.device)
        self.number[tokens] = torch.arange(len(tokens), device=ids.device)
        if getattr(layer, "padding_idx", None) is not None:
            self.number[layer.padding_idx] = len(tokens)

    def at(self, index: Tensor) -> Tensor:
        """The gradient at flat positions."""
        width = self.rows.shape[1]
        return self.rows[self.number[index // width], index % width]

    def in_block(self, block: Block) -> Tensor:
        """The gradient in a block, flat."""
        if block.dim is None:
            return self.at(block.ids)
        if block.dim == 0:
            return self.rows[self.number[block.ids]].flatten()
        return self.rows.index_select(1, block.ids)[self.number].flatten()
