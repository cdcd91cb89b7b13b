"""Start a model sparse, so that it never has to be dense."""

import math
from typing import Literal, get_args

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ..modeling.configuration_circuitgpt import CircuitGPTConfig
from ..modeling.csr import CSR
from ..modeling.modeling_circuitgpt import CircuitGPTForCausalLM
from ..modeling.sparse_layers import SPARSE_LAYERS, run_on_nonzeros
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
    config: PreTrainedConfig,
    density: float,
    *,
    min_nonzeros: int = 4,
    seed: int = 0,
    **group_settings: object,
) -> PreTrainedModel:
    """A fresh causal language model that holds, multiplies and trains only the nonzeros of weights.

    As a fresh model that [`sparsify_initialization_`] thinned out (random places, rescaled) and
    `to_sparse()` switched, but no matrix that is to be sparse is ever allocated; a tied embedding
    is one sparse matrix, used twice. Layers of other classes than `nn.Linear`, `Conv1D` and
    `nn.Embedding`, as Gemma's scaled embedding, hold their zeros. Train it with
    [`RCDSparseOptimizer`] and [`PartialGradients`], or `sparsifier="rcd"`.

    Args:
        config: of a CircuitGPT, or of any causal language model of transformers.
        density: share of each sparse matrix that is not zero, in (0, 1].
        min_nonzeros: entries that each row of a linear layer has in any case.
        seed: of places and values; the global generators are not touched.
        group_settings: which parameters are sparse, as for [`sparse_param_groups`].

    Raises:
        ValueError: if a setting is out of range, or the config's model has weights that are not
            matrices, as those of experts.
    """
    check_density(density)
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        if isinstance(config, CircuitGPTConfig):
            model = CircuitGPTForCausalLM(config)
        else:
            model = AutoModelForCausalLM.from_config(config)
    stacked = [name for name, p in model.named_parameters() if p.ndim > 2]
    if stacked:
        raise ValueError(
            f"{type(model).__name__} has {stacked[0]} (and {len(stacked) - 1} more) with more than "
            "two dimensions, as for experts, but only matrices can be held by their nonzeros: "
            "choose a config without."
        )
    of_weight = {
        id(p): group
        for group in sparse_param_groups(model, min_nonzeros=min_nonzeros, **group_settings)
        for _, p in group["params"]
    }
    deviations = _deviations(model)
    others = [m for m in model.modules() if type(m) not in SPARSE_LAYERS]
    elsewhere = {id(p) for m in others for p in m._parameters.values()}  # as scaled embeddings
    nonzeros: dict[str, CSR] = {}
    drawn: dict[int, CSR] = {}  # by weight, as layers may be tied
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        group = of_weight.get(id(weight))
        if type(module) not in SPARSE_LAYERS or group is None or not group["sparse"]:
            continue
        if id(weight) in elsewhere:
            continue
        if id(weight) not in drawn:
            std = deviations.get(id(weight), getattr(config, "initializer_range", 0.02))
            drawn[id(weight)] = _draw(weight, density, group, std, generator)
            if (padding := getattr(module, "padding_idx", None)) is not None:
                starts = drawn[id(weight)].row_starts
                drawn[id(weight)].values[starts[padding] : starts[padding + 1]] = 0.0
        nonzeros[name] = drawn[id(weight)]
    run_on_nonzeros(model, nonzeros)
    model._apply(lambda t: torch.zeros_like(t, device="cpu") if t.is_meta else t)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # of what is held dense
        _initialize(model)
    # What other layers hold, zeros and all; the rest has its nonzeros already.
    sparsify_initialization_(model, density, min_nonzeros=min_nonzeros, seed=seed, **group_settings)
    return model


def _initialize(model: PreTrainedModel) -> None:
    # Parts before the whole, which may draw some of their weights again.
    for module in reversed(list(model.modules())):
        model._init_weights(module)


class _Drawn(TorchDispatchMode):
    """Notes what tensors are filled with at random: by id, the standard deviation."""

    def __init__(self) -> None:
        super().__init__()
        self.deviations: dict[int, float] = {}

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        # Both have two numbers, 0 and 1 unless they are passed: mean and deviation, or the range.
        if function in (torch.ops.aten.normal_.default, torch.ops.aten.uniform_.default):
            tensor, *passed = arguments
            first, second = (*passed, *(0.0, 1.0)[len(passed) :])
            uniform = function is torch.ops.aten.uniform_.default
            self.deviations[id(tensor)] = (second - first) / math.sqrt(12) if uniform else second
        return function(*arguments, **(options or {}))


def _deviations(model: PreTrainedModel) -> dict[int, float]:
    """The standard deviation that each weight of a model on the meta device is drawn with."""
    with _Drawn() as drawn:
        _initialize(model)
    return drawn.deviations


def _draw(
    weight: torch.Tensor, density: float, group: dict, std: float, generator: torch.Generator
) -> CSR:
    """Random nonzeros with the sum of squares of the dense matrix, in the layout of the weight."""
    row_dim = group["row_dim"]
    rows, width = weight.shape[row_dim], weight.shape[1 - row_dim]
    budget = max(nonzero_budget(rows * width, density), rows * min(group["min_nonzeros"], width))
    pattern = _random_pattern(rows, width, budget, generator)
    if row_dim == 1:  # output neurons are the columns of what is stored
        at = pattern.positions
        pattern = CSR.from_positions((at % width * rows + at // width).sort().values, weight.shape)
    std = std * math.sqrt(rows * width / budget)
    return pattern.with_values(std * torch.randn(budget, generator=generator))


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
