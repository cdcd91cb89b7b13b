"""Layers that hold, multiply and train only the nonzeros of their weight.

[`SparseLinear`] and [`SparseEmbedding`] take the place of `nn.Linear` and `nn.Embedding` when a
model is switched to sparse execution ([`to_sparse`] in `sparse_execution.py`). Outside they look
like the dense layer: `weight` is the dense matrix, computed when asked for, and `state_dict()` has
its name and values.

The nonzeros are stored row by row (CSR): `values` and `columns`, `(nonzeros,)`, and `row_starts`,
`(rows + 1,)`, which says where each row begins. The product is a compiled kernel's where there is
one, else the vendor's (MKL, cuSPARSE) through `torch.sparse`; [`sparse_matmul_reference`] is the
plain path beside them.
"""

import warnings
from typing import Any

import torch
from torch import nn

from .kernel_slot import kernels_for

# Tokens multiplied at a time on the CPU: the piece of the output that is transposed into place then
# still lies in the cache. With 2048 tokens and 4096 outputs that is twice as fast as at once.
_TOKENS = 32
_HALF = (torch.float16, torch.bfloat16)

with warnings.catch_warnings():  # torch says once per process that its CSR support is in beta
    warnings.simplefilter("ignore")
    torch.zeros(1, 1, device="cpu").to_sparse_csr()


def sparse_matmul_reference(
    x: torch.Tensor,
    row_starts: torch.Tensor,
    columns: torch.Tensor,
    values: torch.Tensor,
    rows: int,
) -> torch.Tensor:
    """[`sparse_matmul`], written plainly; also what runs where torch was built without MKL."""
    row_of = torch.repeat_interleave(torch.arange(rows, device=x.device), row_starts.diff())
    return x.new_zeros(len(x), rows).index_add(1, row_of, x[:, columns] * values.to(x.dtype))


def sparse_matmul(
    x: torch.Tensor,
    row_starts: torch.Tensor,
    columns: torch.Tensor,
    values: torch.Tensor,
    rows: int,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """`x @ weight.T + bias` for a weight given by its nonzeros; not differentiable by itself.

    Args:
        x: `(tokens, width)`. Half precision on the CPU is multiplied in float32 and rounded.
        row_starts: `(rows + 1,)` int32.
        columns: `(nonzeros,)` int32, below `width`.
        values: `(nonzeros,)`.
        rows: of the weight.
        bias: `(rows,)`.

    Returns:
        `(tokens, rows)`, contiguous, in the dtype of `x`.
    """
    if kernels := kernels_for(x, values):
        return kernels.sparse_linear(x, row_starts, columns, values, rows, bias)
    on_cpu = x.device.type == "cpu"
    if on_cpu and not torch.backends.mkl.is_available():
        y = sparse_matmul_reference(x, row_starts, columns, values, rows)
        return y if bias is None else y + bias
    dtype = x.dtype
    if on_cpu and dtype in _HALF:
        x = x.float()
    matrix = torch.sparse_csr_tensor(
        row_starts, columns, values.to(x.dtype), (rows, x.shape[1]), check_invariants=False
    )
    if not on_cpu or len(x) <= 1:
        y = (matrix @ x.t().contiguous()).t().contiguous().to(dtype)
        return y if bias is None else y.add_(bias)
    out = torch.empty(len(x), rows, dtype=dtype)
    for start in range(0, len(x), _TOKENS):
        # MKL is many times slower on a transposed view than on a transposed copy.
        piece = x[start : start + _TOKENS].t().contiguous()
        part = out[start : start + _TOKENS].copy_((matrix @ piece).t())
        if bias is not None:
            part.add_(bias)
    return out


def transposed(
    row_starts: torch.Tensor, columns: torch.Tensor, width: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The pattern of the transposed matrix.

    Returns:
        Its `row_starts`, its `columns`, and `order`, `(nonzeros,)` int64: its values are
        `values[order]`.
    """
    rows = len(row_starts) - 1
    row_of = torch.repeat_interleave(
        torch.arange(rows, device=columns.device, dtype=columns.dtype), row_starts.diff()
    )
    order = columns.argsort(stable=True)
    counts = torch.bincount(columns, minlength=width)
    starts = torch.zeros(width + 1, dtype=row_starts.dtype, device=columns.device)
    starts[1:] = counts.cumsum(0)
    return starts, row_of[order], order


class _SparseMatmul(torch.autograd.Function):
    """`x @ weight.T + bias`, whose gradients also cost only what the nonzeros cost."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        values: torch.Tensor,
        bias: torch.Tensor | None,
        layer: "SparseLinear",
    ) -> torch.Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x, values)
        return sparse_matmul(x, layer.row_starts, layer.columns, values, layer.shape[0], bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, values = ctx.saved_tensors
        layer, grad = ctx.layer, grad.contiguous()
        grad_x = grad_values = grad_bias = None
        if ctx.needs_input_grad[0]:
            starts, columns, order = layer.transposed_pattern()
            grad_x = sparse_matmul(grad, starts, columns, values[order], layer.shape[1])
        if ctx.needs_input_grad[1]:
            grad_values = sampled_product(layer.row_starts, layer.columns, grad, x)
            grad_values = grad_values.to(values.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum(0)
        return grad_x, grad_values, grad_bias, None


def sampled_product(
    row_starts: torch.Tensor,
    columns: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
) -> torch.Tensor:
    """`left.T @ right` at some places only: the gradient of a weight at its nonzeros.

    Args:
        row_starts: `(rows + 1,)` int32.
        columns: `(nonzeros,)` int32, below `width`.
        left: `(tokens, rows)`.
        right: `(tokens, width)`.

    Returns:
        `(nonzeros,)`, on the CPU in at least float32.
    """
    if kernels := kernels_for(left, right):
        return kernels.gradient_at(row_starts, columns, left, right)
    if left.device.type == "cpu":
        if not torch.backends.mkl.is_available():
            rows = torch.arange(left.shape[1])
            row_of = torch.repeat_interleave(rows, row_starts.diff())
            return (left[:, row_of] * right[:, columns]).sum(0)
        dtype = torch.promote_types(left.dtype, torch.float32)
        left, right = left.to(dtype), right.to(dtype)
    pattern = torch.sparse_csr_tensor(
        row_starts,
        columns,
        left.new_zeros(len(columns)),
        (left.shape[1], right.shape[1]),
        check_invariants=False,
    )
    return torch.sparse.sampled_addmm(pattern, left.t().contiguous(), right, beta=0.0).values()


class SparseWeight(nn.Module):
    """A matrix `(rows, width)` held by its nonzeros; the base of the two layers below.

    Args:
        row_starts, columns: int32, see above; columns ascend within a row.
        values: `(nonzeros,)`, a parameter if it is one, so that tied layers can share it.
        shape: rows and width.
    """

    def __init__(
        self,
        row_starts: torch.Tensor,
        columns: torch.Tensor,
        values: torch.Tensor,
        shape: tuple[int, int],
    ):
        super().__init__()
        self.shape = (int(shape[0]), int(shape[1]))
        self.values = values if isinstance(values, nn.Parameter) else nn.Parameter(values)
        self.register_buffer("columns", columns, persistent=False)
        self.register_buffer("row_starts", row_starts, persistent=False)
        self._transposed: tuple[torch.Tensor, ...] | None = None

    @property
    def weight(self) -> torch.Tensor:
        """The dense matrix, `(rows, width)`, computed anew; its gradient reaches the nonzeros."""
        dense = self.values.new_zeros(self.shape)
        return dense.index_put_((self.row_of(), self.columns.long()), self.values)

    def row_of(self) -> torch.Tensor:
        """The row of every nonzero, `(nonzeros,)` int64."""
        rows = torch.arange(self.shape[0], device=self.columns.device)
        return torch.repeat_interleave(rows, self.row_starts.diff())

    def transposed_pattern(self) -> tuple[torch.Tensor, ...]:
        """As of [`transposed`], computed once."""
        pattern = self._transposed
        if pattern is None or pattern[0].device != self.columns.device:
            pattern = transposed(self.row_starts, self.columns, self.shape[1])
            self._transposed = pattern
        return pattern

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        destination[f"{prefix}weight"] = self.weight if keep_vars else self.weight.detach()
        bias = getattr(self, "bias", None)
        if bias is not None:
            destination[f"{prefix}bias"] = bias if keep_vars else bias.detach()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        name, bias = f"{prefix}weight", getattr(self, "bias", None)
        if name not in state_dict:
            missing_keys.append(name)
        elif tuple(state_dict[name].shape) != self.shape:
            error_msgs.append(
                f"{name} has shape {tuple(state_dict[name].shape)}, expected {self.shape}."
            )
        else:
            self.set_weight(state_dict[name])
        if bias is not None:
            if f"{prefix}bias" in state_dict:
                with torch.no_grad():
                    bias.copy_(state_dict[f"{prefix}bias"])
            else:
                missing_keys.append(f"{prefix}bias")

    @torch.no_grad()
    def set_weight(self, weight: torch.Tensor) -> None:
        """Take over the nonzeros of a dense matrix; `values` stays the parameter it is, so that an
        optimizer goes on training it."""
        row_starts, columns, values = nonzeros_of(weight.detach().to(self.values))
        self.row_starts, self.columns, self._transposed = row_starts, columns, None
        self.values.data, self.values.grad = values, None

    def extra_repr(self) -> str:
        rows, width = self.shape
        return f"{rows}, {width}, nonzeros={self.values.numel()}"


class SparseLinear(SparseWeight):
    """`nn.Linear` on the nonzeros of its weight: `(..., in_features)` to `(..., out_features)`."""

    def __init__(
        self,
        row_starts: torch.Tensor,
        columns: torch.Tensor,
        values: torch.Tensor,
        shape: tuple[int, int],
        bias: nn.Parameter | None = None,
    ):
        super().__init__(row_starts, columns, values, shape)
        self.out_features, self.in_features = self.shape
        self.register_parameter("bias", bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = _SparseMatmul.apply(x.reshape(-1, self.in_features), self.values, self.bias, self)
        return y.view(*x.shape[:-1], self.out_features)


class SparseEmbedding(SparseWeight):
    """`nn.Embedding` on the nonzeros of its table: ids `(...)` to `(..., embedding_dim)`."""

    def __init__(
        self,
        row_starts: torch.Tensor,
        columns: torch.Tensor,
        values: torch.Tensor,
        shape: tuple[int, int],
    ):
        super().__init__(row_starts, columns, values, shape)
        self.num_embeddings, self.embedding_dim = self.shape

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        flat = ids.reshape(-1)
        starts = self.row_starts[flat].long()
        counts = self.row_starts[flat + 1].long() - starts
        token = torch.repeat_interleave(torch.arange(len(flat), device=ids.device), counts)
        # The n-th nonzero of a token is n places after the start of its row.
        before = counts.cumsum(0) - counts
        place = torch.arange(len(token), device=ids.device) + (starts - before)[token]
        out = self.values.new_zeros(len(flat), self.embedding_dim)
        out.index_put_((token, self.columns[place].long()), self.values[place])
        return out.view(*ids.shape, self.embedding_dim)


def nonzeros_of(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`row_starts` and `columns` (int32) and `values` of a dense matrix."""
    rows, columns = weight.nonzero(as_tuple=True)
    row_starts = torch.zeros(len(weight) + 1, dtype=torch.int32, device=weight.device)
    row_starts[1:] = torch.bincount(rows, minlength=len(weight)).cumsum(0)
    return row_starts, columns.to(torch.int32), weight[rows, columns]


__all__ = ["SparseEmbedding", "SparseLinear", "SparseWeight"]
