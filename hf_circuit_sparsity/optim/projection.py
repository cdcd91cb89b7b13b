"""Exact magnitude projection: keep the largest entries of a matrix and zero the others, in place.

The definition is [`project_topk_reference_`], which sorts. Training calls
[`project_topk_`], which gives the same result entry for entry without sorting the matrix: in
`projection_cpu.py` on the CPU, by Triton on CUDA, by bisection elsewhere, and where rows are spread
over processes as `projection_sharded.py` tells.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels.calling import map_pieces
from ..kernels.cpu import selection_kernels
from .keep_largest import (
    INTEGER_VIEW,
    infinity_bits,
    keep_largest_reference,
    leaders_of_rows,
    not_finite,
)
from .projection_cpu import project_cpu_
from .projection_sharded import project_sharded_each_
from .settings import check
from .sharding import check_sharding, local, shard_group


def nonzero_budget(numel: int, density: float) -> int:
    """How many of `numel` entries a parameter keeps at `density`: at least one, if any."""
    return min(numel, max(1, round(numel * density)))


def project_topk_(weight: Tensor, k: int, min_nonzeros: int = 0, row_dim: int = 0) -> None:
    """Keep the `k` largest-magnitude entries of `weight` and set the others to zero, in place.

    Each row first keeps its own `min_nonzeros` largest nonzero entries; what is left of `k`
    goes to the largest of the remaining entries, wherever they are (Gao et al. 2025, section 2:
    never fewer than j = 4 nonzeros per neuron or attention channel). So the matrix ends with
    exactly `max(k, rows * min(min_nonzeros, columns))` nonzeros, fewer only where a row, or the
    whole matrix, has not so many to begin with. Among equal magnitudes the lowest flat index wins,
    so the result depends on the values alone, not on the device, the thread count or the run.

    A `DTensor` sharded on dimension 0, as `fully_shard` makes it, is projected as the one matrix it
    is: all processes of its mesh have to call this, in the same order.

    Args:
        weight: any shape; float16, bfloat16, float32 or float64. Changed in place.
        k: number of entries to keep, 0 <= k <= `weight.numel()`.
        min_nonzeros: entries that each row keeps in any case; 0 for no row rule.
        row_dim: the dimension that counts output neurons: 0 for `nn.Linear.weight`, 1 for the
            weight of transformers' `Conv1D`. Only read if `min_nonzeros` is above 0.

    Raises:
        ValueError: if an argument is out of range, or `weight` holds NaN or infinity (nothing has
            been changed then), or `weight` is sharded otherwise. On CUDA, where the host does not
            wait for the device, what is not finite is left alone and a later call raises this.
        TypeError: if `weight` is not a floating-point tensor of a supported dtype.
    """
    project_topk_each_([weight], [k], [min_nonzeros], [row_dim])


@torch.no_grad()
def project_topk_each_(
    weights: Sequence[Tensor],
    budgets: Sequence[int],
    minima: Sequence[int],
    row_dims: Sequence[int],
) -> None:
    """[`project_topk_`] of several tensors, each with its own k, row minimum and row dimension.

    On CUDA all are projected together, in about as many launches as one of them takes; on the CPU
    several at a time, each by a thread.

    Raises:
        ValueError, TypeError: as there, before any weight has been changed if an argument is out of
            range; on the CPU, weights before one that is not finite have been projected, and
            perhaps others.
    """
    cases = list(zip(weights, budgets, minima, row_dims, strict=True))
    for weight, k, min_nonzeros, row_dim in cases:
        _check_arguments(weight, k, min_nonzeros, row_dim)
        check_sharding("weight", weight, True, min_nonzeros, row_dim)
    sharded = [case for case in cases if shard_group(case[0]) is not None]
    if sharded:
        project_sharded_each_(*zip(*sharded, strict=True))
        cases = [case for case in cases if shard_group(case[0]) is None]
    together: dict[torch.device, list[tuple[Tensor, int, int, int]]] = {}
    kernels_of: dict[tuple, Any] = {}
    copies, on_cpu = [], []
    for weight, k, min_nonzeros, row_dim in cases:
        if weight.numel() == 0:
            continue
        weight = local(weight)
        matrix, device = _as_matrix(weight), weight.device
        kernels, is_copy = None, not weight.is_contiguous()
        if device.type != "cpu":
            kind = device, matrix.dtype, type(matrix)
            if kind not in kernels_of:
                kernels_of[kind] = selection_kernels(matrix)
            kernels = kernels_of[kind]
        if kernels is not None and kernels.can_project(matrix, min_nonzeros, row_dim):
            together.setdefault(device, []).append((matrix, k, min_nonzeros, row_dim))
            if is_copy:
                copies.append((weight, matrix))
            continue
        if device.type == "cpu":
            on_cpu.append((weight, matrix, k, min_nonzeros, row_dim))
            continue
        _project_alone_(project_bisection_, weight, matrix, k, min_nonzeros, row_dim)
    map_pieces(lambda case: _project_alone_(project_cpu_, *case), on_cpu)
    for members in together.values():
        _project_together_(*zip(*members, strict=True))
    for weight, matrix in copies:
        weight.copy_(matrix.view(weight.shape))


@torch.no_grad()  # every thread has a mode of its own
def _project_alone_(
    project_: Callable[..., None], weight: Tensor, matrix: Tensor, *case: int
) -> None:
    project_(matrix, *case)
    if not weight.is_contiguous():  # then the matrix is a copy
        weight.copy_(matrix.view(weight.shape))


def project_topk_reference_(
    weight: Tensor, k: int, min_nonzeros: int = 0, row_dim: int = 0
) -> None:
    """The definition of [`project_topk_`], by plain stable sorts. Same arguments and errors."""
    _check_arguments(weight, k, min_nonzeros, row_dim)
    with torch.no_grad():
        magnitude = weight.abs()
        if not magnitude.isfinite().all():
            raise not_finite(weight.shape)
        rows = None
        if min_nonzeros:
            shape = [1] * weight.ndim
            shape[row_dim] = -1
            numbers = torch.arange(weight.shape[row_dim], device=weight.device).view(shape)
            rows = numbers.expand(weight.shape).flatten()
        keep = keep_largest_reference(magnitude.flatten(), k, rows, min_nonzeros)
        weight.masked_fill_(~keep.view(weight.shape), 0.0)


def _project_together_(
    matrices: Sequence[Tensor],
    budgets: Sequence[int],
    minima: Sequence[int],
    row_dims: Sequence[int],
) -> None:
    """By the kernels of the device that all matrices are on."""
    try:
        selection_kernels(matrices[0]).project_(matrices, budgets, minima, row_dims)
    except FloatingPointError as error:
        raise not_finite(error.args[0], "in an earlier call") from None


def project_bisection_(matrix: Tensor, k: int, min_nonzeros: int, row_dim: int) -> None:
    """[`project_topk_`] for a contiguous 2-D tensor on any device, without compiled kernels.

    The bits of a non-negative float, read as an integer, sort like the float. The threshold is
    therefore an integer that as many halvings as it has bits find exactly; each halving is one
    compare-and-count over the matrix, which an accelerator does at memory speed, and the count
    never travels to the host.
    """
    top = infinity_bits(matrix.dtype)
    # `top` with the mantissa filled in: every bit but the sign.
    bits = matrix.view(INTEGER_VIEW[matrix.dtype]) & torch.iinfo(INTEGER_VIEW[matrix.dtype]).max
    if bits.max() >= top:
        raise not_finite(matrix.shape)
    keep = torch.zeros_like(bits, dtype=torch.bool)
    if min_nonzeros:
        rows, keep_rows = (bits, keep) if row_dim == 0 else (bits.T, keep.T)
        keep_rows.copy_(leaders_of_rows(rows, min_nonzeros))
    rest = bits.masked_fill_(keep, 0)
    budget = (k - keep.sum()).clamp(min=0)
    # The largest threshold that at least `budget` entries reach, or 1 if so many nonzeros are not
    # there. Invariant: `low` is reached by enough of them (or is 1), `high` is not.
    low = torch.ones((), dtype=torch.int64, device=bits.device)
    high = torch.full((), top, dtype=torch.int64, device=bits.device)
    for _ in range(top.bit_length()):
        middle = low + (high - low) // 2
        enough = (rest >= middle).sum() >= budget
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    above, equal = rest > low, (rest == low).flatten()
    first = equal & (equal.cumsum(dim=0, dtype=torch.int32) <= budget - above.sum())
    keep |= above | first.view(keep.shape)
    matrix.masked_fill_(~keep, 0.0)


def _as_matrix(weight: Tensor) -> Tensor:
    """`weight` as a contiguous 2-D tensor: a view where that is possible, else a copy."""
    if weight.ndim == 2 and weight.is_contiguous():
        return weight.detach()
    flat = weight.detach().contiguous()
    return flat.view(weight.shape[0], -1) if weight.ndim > 1 else flat.view(-1, 1)


def _check_arguments(weight: Tensor, k: int, min_nonzeros: int, row_dim: int) -> None:
    if not isinstance(weight, Tensor) or weight.dtype not in INTEGER_VIEW:
        kind = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(
            f"weight is {kind}, expected a float16, bfloat16, float32 or float64 tensor."
        )
    rows = min_nonzeros == 0 or (min_nonzeros > 0 and weight.ndim == 2 and row_dim in (0, 1))
    if rows and 0 <= k <= weight.numel():
        return  # before any message is put together
    shape = tuple(weight.shape)
    check("k", k, 0 <= k <= weight.numel(), f"0 to {weight.numel()} entries of a weight {shape}")
    check("min_nonzeros", min_nonzeros, min_nonzeros >= 0, "a number >= 0")
    if min_nonzeros:
        holds, expected = weight.ndim > 1, f"0, as a weight of shape {shape} has no rows"
        check("min_nonzeros", min_nonzeros, holds, expected)
        holds = row_dim == 0 or (row_dim == 1 and weight.ndim == 2)
        expected = f"0, or 1 for a matrix stored as inputs × outputs (Conv1D), not {shape}"
        check("row_dim", row_dim, holds, expected)
