"""Start a model sparse, so that it never has to be dense."""

import math
from typing import Literal, get_args

import torch
from torch import nn

from ..modeling.configuration_circuitgpt import CircuitGPTConfig
from ..modeling.csr import CSR
from ..modeling.modeling_circuitgpt import CircuitGPTForCausalLM
from ..modeling.sparse_layers import run_on_nonzeros
from .keep_largest import positions_of
from .param_groups import sparse_param_groups
from .projection import nonzero_budget, project_topk_
from .settings import check, check_density

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
    """Thin the matrices that are to be sparse out to `density`, in place.

    With `support="random"` every row keeps as many entries as every other, give or take one, at
    places drawn at random; with `"magnitude"` each matrix keeps its largest entries, which suits
    a model that has been trained. With `rescale` the kept entries are multiplied so that the sum
    of squares of a matrix stays what it was: outputs then vary as much as before. A matrix that has
    no more nonzeros than it may keep is left as it is, so a sparse checkpoint goes through
    unchanged. Vectors are left alone: biases start at zero.

    Args:
        density: share of each sparse matrix that stays, in (0, 1].
        min_nonzeros: entries that each row of a linear layer keeps in any case.
        seed: of the places; the global generators are not touched.
        group_settings: which parameters are sparse, as for [`sparse_param_groups`].

    Returns:
        Name and number of nonzeros of every matrix that was thinned out.

    Raises:
        ValueError: if a setting is out of range, or nothing would be sparse.
    """
    check_density(density)
    check("support", support, support in SUPPORTS, f"one of {', '.join(SUPPORTS)}")
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
                pattern = _random_pattern(rows, per_row, budget, generator)
                dropped = torch.ones(p.numel(), dtype=torch.bool)
                dropped[pattern.positions] = False
                by_row = p.transpose(0, row_dim)
                by_row.masked_fill_(dropped.view(by_row.shape).to(p.device), 0.0)
            after = torch.linalg.vector_norm(p).item()
            if rescale and after > 0.0 and math.isfinite(before):
                p.mul_(before / after)
            thinned[name] = int(torch.count_nonzero(p))
    return thinned


@torch.no_grad()
def sparse_from_config(
    config: CircuitGPTConfig,
    density: float,
    *,
    min_nonzeros: int = 4,
    seed: int = 0,
    **group_settings: object,
) -> CircuitGPTForCausalLM:
    """A fresh CircuitGPT that holds, multiplies and trains only the nonzeros of its weights.

    As a fresh model that [`sparsify_initialization_`] thinned out (random places, rescaled) and
    `to_sparse()` switched, but no matrix that is to be sparse is ever allocated. Train it with
    [`RCDSparseOptimizer`] and [`PartialGradients`], or `sparsifier="rcd"`.

    Args:
        density: share of each sparse matrix that is not zero, in (0, 1].
        min_nonzeros: entries that each row of a linear layer has in any case.
        seed: of places and values; the global generators are not touched.
        group_settings: which parameters are sparse, as for [`sparse_param_groups`].

    Raises:
        ValueError: if a setting is out of range, or the config ties embedding and unembedding.
    """
    check_density(density)
    if config.tied_unembed:
        raise ValueError(
            "the config has tied_unembed=True, but a sparse embedding and its unembedding are "
            "drawn one by one: pass tied_unembed=False."
        )
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        model = CircuitGPTForCausalLM(config)
    groups = sparse_param_groups(model, min_nonzeros=min_nonzeros, **group_settings)
    minima = {name: g["min_nonzeros"] for g in groups if g["sparse"] for name, _ in g["params"]}
    nonzeros = {}
    for name, module in model.named_modules():
        if type(module) not in (nn.Linear, nn.Embedding) or f"{name}.weight" not in minima:
            continue
        rows, width = module.weight.shape
        budget = max(
            nonzero_budget(rows * width, density), rows * min(minima[f"{name}.weight"], width)
        )
        pattern = _random_pattern(rows, width, budget, generator)
        # The sum of squares of the dense matrix that the config asks for.
        std = config.initializer_range * math.sqrt(rows * width / budget)
        nonzeros[name] = pattern.with_values(std * torch.randn(budget, generator=generator))
    run_on_nonzeros(model, nonzeros)
    model._apply(lambda t: torch.zeros_like(t, device="cpu") if t.is_meta else t)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # of what stays dense
        for module in model.modules():
            model._init_weights(module)
    return model


def _random_pattern(rows: int, width: int, budget: int, generator: torch.Generator) -> CSR:
    """`budget` random places, as many in every row as in every other, give or take one."""
    counts = torch.full((rows, 1), budget // rows)
    counts[torch.randperm(rows, generator=generator)[: budget % rows]] += 1
    positions, step = [], max(1, _PIECE // width)
    for start in range(0, rows, step):
        piece = counts[start : start + step]
        # An entry's place in a random order of its row, against the number the row has.
        order = torch.rand(len(piece), width, generator=generator).argsort(dim=1)
        positions.append(start * width + positions_of((order < piece).flatten()))
    return CSR.from_positions(torch.cat(positions), (rows, width))
