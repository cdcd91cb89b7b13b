"""Start a model sparse, so that it never has to be dense."""

import math
from typing import Literal, get_args

import torch
from torch import nn

from .param_groups import sparse_param_groups
from .projection import nonzero_budget, project_topk_

Support = Literal["random", "magnitude"]
SUPPORTS: tuple[str, ...] = get_args(Support)

# Rows looked at at a time, in entries: what is drawn for them is all the memory this takes.
_PIECE = 1 << 20


@torch.no_grad()
def sparsify_initialization_(
    model: nn.Module,
    density: float,
    *,
    support: Support = "random",
    rescale: bool = True,
    min_nonzeros: int = 4,
    seed: int = 0,
    **group_settings: object,
) -> dict[str, int]:
    """Thin the matrices that are to be sparse out to ``density``, in place.

    With ``support="random"`` every row keeps as many entries as every other, give or take one, at
    places drawn at random; with ``"magnitude"`` each matrix keeps its largest entries, which suits
    a model that has been trained. With ``rescale`` the kept entries are multiplied so that the sum
    of squares of a matrix stays what it was: outputs then vary as much as before. A matrix that has
    no more nonzeros than it may keep is left as it is, so a sparse checkpoint goes through
    unchanged. Vectors are left alone: biases start at zero.

    Args:
        density: share of each sparse matrix that stays, in (0, 1].
        min_nonzeros: entries that each row of a linear layer keeps in any case.
        seed: of the places; the global generators are not touched.
        group_settings: which parameters are sparse, as for :func:`sparse_param_groups`.

    Returns:
        Name and number of nonzeros of every matrix that was thinned out.

    Raises:
        ValueError: if a setting is out of range, or nothing would be sparse.
    """
    if not 0.0 < density <= 1.0:
        raise ValueError(
            f"density={density} is outside (0, 1]: pass the share of weights to keep, for example "
            "1/64."
        )
    if support not in SUPPORTS:
        raise ValueError(f"support={support!r} is unknown: expected one of {', '.join(SUPPORTS)}.")
    generator = torch.Generator().manual_seed(seed)
    thinned = {}
    for group in sparse_param_groups(model, min_nonzeros=min_nonzeros, **group_settings):
        for name, p in group["params"] if group["sparse"] else []:
            if p.ndim < 2:
                continue
            minimum, row_dim = group["min_nonzeros"], group["row_dim"]
            rows = p.shape[row_dim]
            per_row = p.numel() // rows
            budget = max(nonzero_budget(p.numel(), density), rows * min(minimum, per_row))
            if int(torch.count_nonzero(p)) <= budget:
                continue
            before = torch.linalg.vector_norm(p).item()
            if support == "magnitude":
                project_topk_(p, budget, minimum, row_dim)
            else:
                _keep_random_(p.transpose(0, row_dim), budget, generator)
            after = torch.linalg.vector_norm(p).item()
            if rescale and after > 0.0 and math.isfinite(before):
                p.mul_(before / after)
            thinned[name] = int(torch.count_nonzero(p))
    return thinned


def _keep_random_(matrix: torch.Tensor, budget: int, generator: torch.Generator) -> None:
    """Keep ``budget`` entries of a matrix, spread evenly over its rows."""
    rows, width = len(matrix), matrix[0].numel()
    counts = torch.full((rows,), budget // rows)
    counts[torch.randperm(rows, generator=generator)[: budget % rows]] += 1
    step = max(1, _PIECE // width)
    for start in range(0, rows, step):
        piece = matrix[start : start + step]
        order = torch.rand(len(piece), width, generator=generator).argsort(dim=1)
        # An entry's place in a random order of its row, against the number the row keeps.
        dropped = order >= counts[start : start + step, None]
        piece.masked_fill_(dropped.view(piece.shape).to(piece.device), 0.0)
