"""Switches a model between running on its dense matrices and on their nonzeros, in place."""

from typing import TypeVar

import torch
from torch import nn
from transformers.utils import logging

from .sparse_layers import SparseEmbedding, SparseLinear, SparseWeight, nonzeros_of

logger = logging.get_logger(__name__)

Model = TypeVar("Model", bound=nn.Module)

# A layer runs on its nonzeros up to this share of them. Measured by `benchmarks.sparse_execution`
# on a CPU in float32: a 4096 × 1024 layer breaks even at about one nonzero in four, with 256 tokens
# and with one alike; at one in eight it takes a half and three quarters of the dense time.
MAX_DENSITY = 1 / 8


def to_sparse(model: Model, threshold: float = MAX_DENSITY) -> Model:
    """Let linear layers and embeddings run on their nonzeros; see `to_dense` for the way back.

    Node sites, their hooks and the names and values in `state_dict()` stay what they are. Forward
    hooks on a replaced layer itself are lost, and an optimizer made before holds the old
    parameters. A model of which no layer is sparse enough is left as it is, with a warning.

    Args:
        threshold: layers with a larger share of nonzeros stay dense, 0 to 1.

    Raises:
        ValueError: the threshold is out of range, or weights are not in memory (offloaded).
    """
    if not 0 <= threshold <= 1:
        raise ValueError(
            f"threshold={threshold} was passed, but it is a share of nonzeros; pass 0 to 1."
        )
    candidates = [
        (name, module)
        for name, module in model.named_modules()
        if type(module) in (nn.Linear, nn.Embedding)
    ]
    for name, module in candidates:
        if module.weight.device.type == "meta":
            raise ValueError(
                f"{name}.weight is not in memory (offloaded); load the model without offloading "
                "to run it on its nonzeros."
            )
    shared: dict[int, SparseWeight] = {}
    densest = 1.0
    for name, module in candidates:
        weight = module.weight
        density = float(torch.count_nonzero(weight)) / max(1, weight.numel())
        densest = min(densest, density)
        if density > threshold:
            continue
        twin = shared.get(id(weight))  # the unembedding, where it is tied to the embedding
        layer = _sparse_layer(module, twin)
        shared.setdefault(id(weight), layer)
        replace_module(model, name, layer)
    if candidates and not shared:
        logger.warning(
            "%s is not sparse: its sparsest layer has %.1f %% nonzeros, more than the %.1f %% up "
            "to which running on the nonzeros pays. It stays dense.",
            type(model).__name__,
            100 * densest,
            100 * threshold,
        )
    return model


def to_dense(model: Model) -> Model:
    """Undo `to_sparse`: every layer holds and multiplies its dense matrix again, in place."""
    shared: dict[int, nn.Parameter] = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, SparseWeight):
            replace_module(model, name, dense_layer(module, shared))
    return model


def sparse_layers(model: nn.Module) -> dict[str, SparseWeight]:
    """The layers that run on their nonzeros, by name."""
    return {n: module for n, module in model.named_modules() if isinstance(module, SparseWeight)}


def dense_layer(layer: SparseWeight, shared: dict[int, nn.Parameter]) -> nn.Module:
    """The dense layer with the weight of `layer`; `shared` keeps tied layers tied."""
    rows, width = layer.shape
    weight = shared.get(id(layer.values))
    if weight is None:
        trainable = layer.values.requires_grad
        weight = nn.Parameter(layer.weight.detach(), requires_grad=trainable)
        shared[id(layer.values)] = weight
    with torch.device("meta"):  # nothing is allocated for weights that are replaced
        if isinstance(layer, SparseEmbedding):
            dense = nn.Embedding(rows, width)
        else:
            dense = nn.Linear(width, rows, bias=False)
            dense.bias = layer.bias
    dense.weight = weight
    return dense.train(layer.training)


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` at the dotted `name` within `model`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _sparse_layer(module: nn.Module, twin: SparseWeight | None) -> SparseWeight:
    if twin is not None:
        parts = (twin.row_starts, twin.columns, twin.values, twin.shape)
    else:
        row_starts, columns, values = nonzeros_of(module.weight.detach())
        values = nn.Parameter(values, requires_grad=module.weight.requires_grad)
        parts = (row_starts, columns, values, tuple(module.weight.shape))
    if isinstance(module, nn.Embedding):
        layer = SparseEmbedding(*parts)
    else:
        layer = SparseLinear(*parts, bias=module.bias)
    return layer.train(module.training)
