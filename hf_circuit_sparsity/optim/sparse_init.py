"""Start a model sparse, so that it never has to be dense."""

import math
from typing import Literal, get_args

import torch
from torch import nn

from ..modeling.configuration_circuitgpt import CircuitGPTConfig
from ..modeling.csr import CSR
from ..modeling.modeling_circuitgpt import CircuitGPTForCausalLM
from ..modeling.sparse_layers import run_on_nonzeros
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
    _check_density(density)
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
    _check_density(density)
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
    layers = {
        name: module
        for name, module in model.named_modules()
        if type(module) in (nn.Linear, nn.Embedding) and f"{name}.weight" in minima
    }
    thin = {id(module.weight) for module in layers.values()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # of what stays dense
        for module in model.modules():
            for attribute, p in list(module._parameters.items()):
                if p is not None and id(p) not in thin:
                    module._parameters[attribute] = nn.Parameter(
                        torch.empty(p.shape), requires_grad=p.requires_grad
                    )
            for attribute, buffer in list(module._buffers.items()):
                module._buffers[attribute] = torch.zeros(buffer.shape, dtype=buffer.dtype)
            for p in (p for p in module._parameters.values() if p is not None and not p.is_meta):
                p.zero_() if p.ndim > 1 else p.fill_(float(not isinstance(module, nn.Linear)))
            model._init_weights(module)  # does nothing to what is still on the meta device
    nonzeros = {}
    for name, module in layers.items():
        shape = tuple(module.weight.shape)
        minimum = min(minima[f"{name}.weight"], shape[1])
        budget = max(nonzero_budget(shape[0] * shape[1], density), shape[0] * minimum)
        csr = _random_nonzeros(shape, budget, config.initializer_range, generator)
        nonzeros[name] = csr
    run_on_nonzeros(model, nonzeros)
    return model


def _random_nonzeros(
    shape: tuple[int, int], budget: int, std: float, generator: torch.Generator
) -> CSR:
    """A matrix with `budget` random entries.

    Their sum of squares is about that of a dense matrix with standard deviation `std`.
    """
    rows, width = shape
    counts = _even_counts(rows, budget, generator)
    row_starts = torch.zeros(rows + 1, dtype=torch.int32)
    row_starts[1:] = counts.cumsum(0)
    columns = []
    step = max(1, _PIECE // width)
    for start in range(0, rows, step):
        wanted = counts[start : start + step]
        order = torch.rand(len(wanted), width, generator=generator).argsort(dim=1)
        # The first places of each row's order, as many as it has entries.
        order = order[:, : int(wanted.max())]
        order[torch.arange(order.shape[1]) >= wanted[:, None]] = width
        order = order.sort(dim=1).values
        columns.append(order[order < width].to(torch.int32))
    values = torch.randn(budget, generator=generator) * (std * math.sqrt(rows * width / budget))
    return CSR(row_starts, torch.cat(columns), values, width)


def _even_counts(rows: int, budget: int, generator: torch.Generator) -> torch.Tensor:
    counts = torch.full((rows,), budget // rows)
    counts[torch.randperm(rows, generator=generator)[: budget % rows]] += 1
    return counts


def _check_density(density: float) -> None:
    if not 0.0 < density <= 1.0:
        raise ValueError(
            f"density={density} is outside (0, 1]: pass the share of weights to keep, for example "
            "1/64."
        )


def _keep_random_(matrix: torch.Tensor, budget: int, generator: torch.Generator) -> None:
    """Keep `budget` entries of a matrix, spread evenly over its rows."""
    rows, width = len(matrix), matrix[0].numel()
    counts = _even_counts(rows, budget, generator)
    step = max(1, _PIECE // width)
    for start in range(0, rows, step):
        piece = matrix[start : start + step]
        order = torch.rand(len(piece), width, generator=generator).argsort(dim=1)
        # An entry's place in a random order of its row, against the number the row keeps.
        dropped = order >= counts[start : start + step, None]
        piece.masked_fill_(dropped.view(piece.shape).to(piece.device), 0.0)
