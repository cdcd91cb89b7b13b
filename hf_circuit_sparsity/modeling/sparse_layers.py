"""Layers that hold, multiply and train only the nonzeros of their weight.

[`to_sparse`] puts [`SparseLinear`] and [`SparseEmbedding`] in the place of `nn.Linear` and
`nn.Embedding`, [`to_dense`] puts these back. Outside they look like the dense layer: `weight` is
the dense matrix, computed when asked for, and `state_dict()` has its name and values.
"""

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers.utils import logging

from .csr import CSR, sampled_reference

logger = logging.get_logger(__name__)

Model = TypeVar("Model", bound=nn.Module)

# Up to this share a layer runs on its nonzeros; it breaks even at one in four (`benchmarks.speed`).
MAX_DENSITY = 1 / 8


class SparseWeight(nn.Module):
    """A matrix held by its nonzeros; the base of the two layers below.

    Args:
        csr: the matrix. If its values are a parameter, as of a tied layer, they are shared.

    Attributes:
        shape: rows and width.
        values: `(nonzeros,)`, the parameter.
        row_starts, columns: as of [`CSR`].
    """

    def __init__(self, csr: CSR, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.shape = csr.shape
        values = csr.values
        self.values = values if isinstance(values, nn.Parameter) else nn.Parameter(values)
        self.register_parameter("bias", bias)  # behind the weight, as in nn.Linear
        self.register_buffer("columns", csr.columns, persistent=False)
        self.register_buffer("row_starts", csr.row_starts, persistent=False)
        self._pattern: CSR | None = None

    @property
    def csr(self) -> CSR:
        """The matrix, with `values` as they are."""
        pattern = self._pattern
        if pattern is None or pattern.columns is not self.columns:  # moved, or replaced
            pattern = self._pattern = CSR(self.row_starts, self.columns, None, self.shape[1])
        return pattern.with_values(self.values)

    @torch.no_grad()
    def assign(self, csr: CSR) -> None:
        """Take over the nonzeros of another matrix of this shape.

        `values` stays the parameter it is, so that an optimizer goes on training it.
        """
        device = self.values.device
        self.row_starts, self.columns = csr.row_starts.to(device), csr.columns.to(device)
        self._pattern = None
        self.values.data, self.values.grad = csr.values.detach().to(self.values), None

    @property
    def weight(self) -> Tensor:
        """The dense matrix, `(rows, width)`, computed anew; its gradient reaches the nonzeros."""
        return self.csr.to_dense()

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        for name in ("weight", "bias"):
            if (tensor := getattr(self, name)) is not None:
                destination[prefix + name] = tensor if keep_vars else tensor.detach()

    @torch.no_grad()
    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, errors
    ) -> None:
        for name in ("weight",) if self.bias is None else ("weight", "bias"):
            tensor = state_dict.get(prefix + name)
            shape = self.shape if name == "weight" else tuple(self.bias.shape)
            if tensor is None:
                missing_keys.append(prefix + name)
            elif tuple(tensor.shape) != shape:
                errors.append(f"{prefix}{name} has shape {tuple(tensor.shape)}, expected {shape}.")
            elif name == "bias":
                self.bias.copy_(tensor)
            else:
                self.assign(CSR.from_dense(tensor.detach().to(self.values)))

    def extra_repr(self) -> str:
        return f"{self.shape[0]}, {self.shape[1]}, nonzeros={self.values.numel()}"


class SparseLinear(SparseWeight):
    """`nn.Linear` on the nonzeros of its weight: `(..., in_features)` to `(..., out_features)`."""

    def __init__(self, csr: CSR, bias: nn.Parameter | None = None) -> None:
        super().__init__(csr, bias)
        self.out_features, self.in_features = self.shape

    def forward(self, x: Tensor, csr: CSR | None = None) -> Tensor:
        flat, csr = x.reshape(-1, self.in_features), self.csr if csr is None else csr
        y = _LinearFunction.apply(flat, csr.values, self.bias, csr)
        return y.view(*x.shape[:-1], self.out_features)


class _LinearFunction(torch.autograd.Function):
    """`x @ weight.T + bias`, whose gradients also cost only what the nonzeros cost."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, bias: Tensor | None, csr: CSR) -> Tensor:
        ctx.csr = csr
        ctx.save_for_backward(x, values)
        return csr.linear(x, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, values = ctx.saved_tensors
        grad = grad.contiguous()
        grad_x = grad_values = grad_bias = None
        again = torch.is_grad_enabled()  # to be differentiated again, which a CSR's products cannot
        if ctx.needs_input_grad[0]:
            csr = ctx.csr.with_values(values)
            grad_x = grad @ csr.to_dense().to(grad) if again else csr.transposed().linear(grad)
        if ctx.needs_input_grad[1]:
            sampled = sampled_reference(ctx.csr, grad, x) if again else ctx.csr.sampled(grad, x)
            grad_values = sampled.to(values.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum(0)
        return grad_x, grad_values, grad_bias, None


class SparseEmbedding(SparseWeight):
    """`nn.Embedding` on the nonzeros of its table: ids `(...)` to `(..., embedding_dim)`."""

    padding_idx: int | None = None  # a row that is not trained

    def __init__(self, csr: CSR, bias: None = None) -> None:
        super().__init__(csr)
        self.num_embeddings, self.embedding_dim = self.shape

    def forward(self, ids: Tensor) -> Tensor:
        flat = ids.reshape(-1)
        starts = self.row_starts[flat].long()
        counts = self.row_starts[flat + 1].long() - starts
        token = torch.repeat_interleave(torch.arange(len(flat), device=ids.device), counts)
        # The n-th nonzero of a token is n entries after the start of its row.
        before = counts.cumsum(0) - counts
        entry = torch.arange(len(token), device=ids.device) + (starts - before)[token]
        values = self.values[entry]
        if self.padding_idx is not None:
            values = torch.where(flat[token] == self.padding_idx, values.detach(), values)
        out = values.new_zeros(len(flat), self.embedding_dim)
        out.index_put_((token, self.columns[entry].long()), values)
        return out.view(*ids.shape, self.embedding_dim)


SPARSE_LAYERS = {nn.Linear: SparseLinear, nn.Embedding: SparseEmbedding}  # by what each replaces


def to_sparse(model: Model, threshold: float = MAX_DENSITY) -> Model:
    """Let linear layers and embeddings run on their nonzeros, in place; returns the model.

    Node sites, their hooks and the names and values in `state_dict()` stay what they are. Forward
    hooks on a replaced layer itself are lost, and an optimizer made before holds the old
    parameters. A model of which no layer is sparse enough stays as it is, with a warning.

    Args:
        threshold: layers with a larger share of nonzeros stay dense, 0 to 1.

    Raises:
        ValueError: the threshold is out of range, or weights are not in memory (offloaded).
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold={threshold} was passed, expected a share from 0 to 1.")
    weights = {n: m.weight for n, m in model.named_modules() if type(m) in SPARSE_LAYERS}
    others = [m for m in model.modules() if type(m) not in SPARSE_LAYERS]
    elsewhere = {id(p) for m in others for p in m._parameters.values()}  # tied to what stays dense
    densities, nonzeros = [1.0], {}  # the latter by weight, as layers may be tied
    for name, weight in weights.items():
        if weight.is_meta:
            raise ValueError(f"{name}.weight is not in memory (offloaded); load it into memory.")
        densities.append(float(torch.count_nonzero(weight)) / max(1, weight.numel()))
        if densities[-1] <= threshold and id(weight) not in elsewhere | nonzeros.keys():
            nonzeros[id(weight)] = CSR.from_dense(weight)
    run_on_nonzeros(model, {n: nonzeros[id(w)] for n, w in weights.items() if id(w) in nonzeros})
    if weights and not nonzeros:
        logger.warning(
            f"{type(model).__name__} is not sparse: its sparsest layer has {min(densities):.1%} "
            f"nonzeros, running on them pays up to {threshold:.1%}. It stays dense."
        )
    return model


def run_on_nonzeros(model: nn.Module, nonzeros: dict[str, CSR]) -> None:
    """Put layers that run on `nonzeros` in the place of the dense ones of the same names.

    Layers with the same nonzeros, such as a tied embedding and unembedding, share them.
    """
    for name, csr in nonzeros.items():
        module = model.get_submodule(name)
        if not isinstance(csr.values, nn.Parameter):
            values = csr.values.to(module.weight.dtype)
            csr.values = nn.Parameter(values, module.weight.requires_grad)
        layer = SPARSE_LAYERS[type(module)](csr, getattr(module, "bias", None))
        layer.padding_idx = getattr(module, "padding_idx", None)
        module.weight, layer.dense = None, (module,)  # no submodule, but what to_dense puts back
        model.set_submodule(name, layer.train(module.training))


def to_dense(model: Model) -> Model:
    """Undo `to_sparse`, in place: every layer holds and multiplies its dense matrix again."""
    shared: dict[int, nn.Parameter] = {}  # by values, as layers may be tied
    for name, layer in sparse_layers(model).items():
        values, (dense,) = layer.values, layer.dense
        if id(values) not in shared:
            shared[id(values)] = nn.Parameter(layer.weight.detach(), values.requires_grad)
        dense.weight = shared[id(values)]
        if layer.bias is not None:
            dense.bias = layer.bias
        model.set_submodule(name, dense.train(layer.training))
    return model


def sparse_layers(model: nn.Module) -> dict[str, SparseWeight]:
    """The layers that run on their nonzeros, by name."""
    return {n: module for n, module in model.named_modules() if isinstance(module, SparseWeight)}
