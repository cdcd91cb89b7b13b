"""The nonzeros of a matrix, row by row (CSR): the one form in which they are held and multiplied.

A product is computed by a compiled kernel where there is one, else by the vendor's library (MKL,
cuSPARSE) through `torch.sparse`. [`linear_reference`] and [`sampled_reference`] are the plain paths
beside them.
"""

import warnings
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from .functional import compiled_kernels

# Tokens multiplied at a time on the CPU: the output's piece stays in the cache, twice as fast.
_TOKENS = 32

with warnings.catch_warnings():  # torch says once per process that its CSR support is in beta
    warnings.simplefilter("ignore")
    torch.zeros(1, 1, device="cpu").to_sparse_csr()


class CSR:
    """A matrix `(rows, width)` given by its nonzeros. Its products are not differentiable.

    Args:
        row_starts: `(rows + 1,)` int32, where each row begins in `columns` and `values`.
        columns: `(nonzeros,)` int32, ascending within a row.
        values: `(nonzeros,)`, or None for the pattern alone.
        width: number of columns.
    """

    def __init__(self, row_starts: Tensor, columns: Tensor, values: Tensor | None, width: int):
        self.shape = (len(row_starts) - 1, int(width))
        self.row_starts, self.columns, self.values = row_starts, columns, values
        # The transposed pattern and the order of its values; shared with what `with_values` makes.
        self._transposed: list[CSR | Tensor] = []

    @classmethod
    def from_dense(cls, weight: Tensor) -> "CSR":
        """The nonzeros of a matrix."""
        weight = weight.detach()
        if kernels := compiled_kernels(weight):
            row_starts, columns, values = kernels.nonzeros(weight)
            # To stay: without the room that the kernel leaves behind them.
            return cls(row_starts, columns.clone(), values.clone(), weight.shape[1])
        flat = weight.reshape(-1)
        if flat.device.type == "cpu":  # numpy takes a fraction of torch's time
            positions = torch.from_numpy(np.flatnonzero((flat != 0).numpy()))
        else:
            positions = flat.nonzero().flatten()
        return cls.from_positions(positions, weight.shape, flat[positions])

    @classmethod
    def from_positions(
        cls, positions: Tensor, shape: tuple[int, int], values: Tensor | None = None
    ) -> "CSR":
        """The matrix whose nonzeros are at flat `positions`, `(nonzeros,)` int64, ascending."""
        csr = cls.__new__(cls)  # row_starts and columns are computed when they are first needed
        csr.shape = (int(shape[0]), int(shape[1]))
        csr.positions, csr.values, csr._transposed = positions, values, []
        return csr

    @cached_property
    def row_starts(self) -> Tensor:
        rows, width = self.shape
        first = torch.arange(rows + 1, device=self.positions.device) * width
        return torch.searchsorted(self.positions, first, out_int32=True)

    @cached_property
    def columns(self) -> Tensor:
        return (self.positions % self.shape[1]).to(torch.int32)

    @cached_property
    def positions(self) -> Tensor:
        """Where the nonzeros are in the flat matrix, ascending, `(nonzeros,)` int64."""
        return self.row_of * self.shape[1] + self.columns

    @property
    def row_of(self) -> Tensor:
        """The row of every nonzero, `(nonzeros,)` int64."""
        rows = torch.arange(self.shape[0], device=self.columns.device)
        return torch.repeat_interleave(rows, self.row_starts.diff())

    def __len__(self) -> int:
        return len(self.__dict__.get("columns", self.__dict__.get("positions")))

    def with_values(self, values: Tensor | None) -> "CSR":
        """The matrix with the same pattern and other values."""
        other = CSR(self.row_starts, self.columns, values, self.shape[1])
        other._transposed = self._transposed
        return other

    def to_dense(self) -> Tensor:
        """The matrix itself; its gradient reaches `values`."""
        dense = self.values.new_zeros(self.shape)
        return dense.index_put_((self.row_of, self.columns.long()), self.values)

    def transposed(self) -> "CSR":
        """The transposed matrix, of which `linear` is `x @ W`; its pattern is computed once."""
        if not self._transposed:
            rows, width = self.shape
            # Any float32 tensor on the CPU would do to ask whether there are kernels.
            if kernels := compiled_kernels(self.columns.view(torch.float32)):
                turned = kernels.transpose_pattern(self.row_starts, self.columns, width)
                starts, columns, order = turned
            else:
                order = self.columns.argsort(stable=True)
                counts = torch.bincount(self.columns, minlength=width)
                starts = self.row_starts.new_zeros(width + 1)
                starts[1:] = counts.cumsum(0)
                columns = self.row_of.to(torch.int32)[order]
            self._transposed += CSR(starts, columns, None, rows), order
        pattern, order = self._transposed
        values = None if self.values is None else self.values.index_select(0, order)
        return pattern.with_values(values)

    def _as_torch(self, values: Tensor) -> Tensor:
        parts = self.row_starts, self.columns, values, self.shape
        return torch.sparse_csr_tensor(*parts, check_invariants=False)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x @ W.T + bias`, `(tokens, width)` to contiguous `(tokens, rows)` in the dtype of `x`.

        Half precision on the CPU is multiplied in float32 and rounded.
        """
        rows = self.shape[0]
        if kernels := compiled_kernels(x, self.values):
            return kernels.sparse_linear(x, self.row_starts, self.columns, self.values, rows, bias)
        on_cpu = x.device.type == "cpu"
        if on_cpu and not torch.backends.mkl.is_available():
            return linear_reference(self, x, bias)
        out = x.new_empty(len(x), rows)
        if on_cpu and x.dtype in (torch.float16, torch.bfloat16):
            x = x.float()
        matrix = self._as_torch(self.values.to(x.dtype))
        tokens = _TOKENS if on_cpu else max(1, len(x))
        for part, piece in zip(out.split(tokens), x.split(tokens), strict=True):
            # MKL is many times slower on a transposed view than on a transposed copy.
            part.copy_((matrix @ piece.t().contiguous()).t())
            if bias is not None:
                part.add_(bias)
        return out

    def sampled(self, left: Tensor, right: Tensor) -> Tensor:
        """`left.T @ right` at the nonzeros, the gradient of a weight there.

        `(tokens, rows)` and `(tokens, width)` to `(nonzeros,)`, on the CPU in float32 at least.
        """
        if kernels := compiled_kernels(left, right):
            return kernels.gradient_at(self.row_starts, self.columns, left, right)
        if left.device.type == "cpu":
            dtype = torch.promote_types(left.dtype, torch.float32)
            left, right = left.to(dtype), right.to(dtype)
            if not torch.backends.mkl.is_available():
                return sampled_reference(self, left, right)
        pattern = self._as_torch(left.new_zeros(len(self)))
        return torch.sparse.sampled_addmm(pattern, left.t().contiguous(), right, beta=0.0).values()

    def __repr__(self) -> str:
        return f"CSR({self.shape[0]}, {self.shape[1]}, nonzeros={len(self)})"


def linear_reference(csr: CSR, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """[`CSR.linear`], written plainly; also what runs where torch was built without MKL."""
    y = x.new_zeros(len(x), csr.shape[0])
    y.index_add_(1, csr.row_of, x[:, csr.columns] * csr.values.to(x.dtype))
    return y if bias is None else y.add_(bias)


def sampled_reference(csr: CSR, left: Tensor, right: Tensor) -> Tensor:
    """[`CSR.sampled`], written plainly; also what runs where torch was built without MKL."""
    return (left[:, csr.row_of] * right[:, csr.columns]).sum(0)
