"""Which parameters of a model are made sparse, as parameter groups for an optimizer."""

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from ..modeling.causal_lm import TRANSPOSED_LAYERS
from ..modeling.sparse_layers import SparseEmbedding, SparseLinear, SparseWeight

# Dense even if a model builds them from a Linear or an Embedding: the bigram table exists so that
# sparse weights need not spend themselves on bigrams, and a sink is one number per head.
ALWAYS_DENSE = ("*bigram_table*", "*sink_logit*")


def sparse_param_groups(
    model: nn.Module,
    weight_decay: float = 0.1,
    sparse_embeddings: bool = True,
    sparse_biases: bool = True,
    min_nonzeros: int = 4,
    exclude_parameters: Iterable[str] = (),
    include_parameters: Iterable[str] = (),
) -> list[dict[str, Any]]:
    """Sort the trainable parameters of `model` into groups for [`TopKAdamW`].

    Sparse are the weights of `nn.Linear`, transformers' `Conv1D` and `nn.Embedding` and the
    biases of the first two (Gao et al. 2025, section 2). Everything else is dense: norms of any
    class, bigram tables, attention sinks. A tied weight appears once and follows the rule for
    embeddings. Frozen parameters (`requires_grad=False`) are left out.

    The nonzeros of a layer that holds nothing else (`SparseLinear`, `SparseEmbedding`) follow
    the rule for its weight, in groups of their own marked `nonzeros=True`, which
    [`RCDSparseOptimizer`] trains.

    Args:
        model: any module; a `PreTrainedModel` also tells which matrix is its unembedding.
        weight_decay: of parameters with two or more dimensions; the others get none.
        sparse_embeddings: whether embeddings and the unembedding are sparse.
        sparse_biases: whether biases of `nn.Linear` and `Conv1D` are sparse.
        min_nonzeros: row minimum of the sparse `nn.Linear` and `Conv1D` weights (per output
            neuron or attention channel); embeddings, the unembedding and biases have none.
        exclude_parameters: shell-style patterns (`fnmatch`: `*`, `?`, `[...]`) matched
            against the full parameter name, for example `"*.mlp.*"`; what matches is dense.
        include_parameters: patterns likewise; what matches is sparse, unless `exclude_parameters`
            matches it too.

    Returns:
        Groups with `params` as (name, parameter) pairs and the keys `weight_decay`, `sparse`,
        `min_nonzeros` and `row_dim`, in an order that depends on the model alone.

    Raises:
        ValueError: if nothing would be sparse, or a pattern matches no trainable parameter.
    """
    exclude, include = tuple(exclude_parameters), tuple(include_parameters)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for argument, patterns in (("exclude_parameters", exclude), ("include_parameters", include)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in parameters):
                raise ValueError(
                    f"the pattern {pattern!r} in {argument} matches none of the "
                    f"{len(parameters)} trainable parameters: check it against "
                    "model.named_parameters() (patterns are shell-style, matched on full names)."
                )
    kinds = _kinds(model)
    groups: dict[tuple, dict[str, Any]] = {}
    for name, parameter in parameters.items():
        kind, row_dim, nonzeros = kinds.get(id(parameter), ("other", 0, False))
        sparse = (
            kind == "weight"
            or (kind == "embedding" and sparse_embeddings)
            or (kind == "bias" and sparse_biases)
        ) and not _matches(name, ALWAYS_DENSE)
        sparse = (sparse or _matches(name, include)) and not _matches(name, exclude)
        is_matrix = nonzeros or parameter.ndim > 1
        has_rows = sparse and kind in ("weight", "other") and is_matrix
        settings = {
            "sparse": sparse,
            "min_nonzeros": min_nonzeros if has_rows else 0,
            "row_dim": row_dim if has_rows else 0,
            "weight_decay": weight_decay if is_matrix else 0.0,
        }
        if nonzeros and sparse:
            settings["nonzeros"] = True
        group = groups.setdefault(tuple(settings.values()), {**settings, "params": []})
        group["params"].append((name, parameter))
    if not any(group["sparse"] for group in groups.values()):
        raise ValueError(
            f"{type(model).__name__} has no trainable parameter to make sparse: expected weights "
            "of nn.Linear, Conv1D or nn.Embedding; name others with include_parameters."
        )
    return list(groups.values())


def trained_weight(layer: nn.Module) -> nn.Parameter:
    """The parameter in which a layer's weight is trained: the matrix, or its nonzeros."""
    return layer.values if isinstance(layer, SparseWeight) else layer.weight


def _kinds(model: nn.Module) -> dict[int, tuple[str, int, bool]]:
    """For each parameter owned by a layer we know: what it is there, its row dimension, and whether
    it holds the nonzeros alone."""
    kinds: dict[int, tuple[str, int, bool]] = {}
    for module in model.modules():
        if isinstance(module, nn.Linear | Conv1D | SparseLinear):
            row_dim = 1 if isinstance(module, TRANSPOSED_LAYERS) else 0
            kind = ("weight", row_dim, isinstance(module, SparseWeight))
            kinds.setdefault(id(trained_weight(module)), kind)
            if module.bias is not None:
                kinds[id(module.bias)] = ("bias", 0, False)
    # Last, so that a weight tied to an embedding counts as one.
    embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding | SparseEmbedding)]
    unembedding = getattr(model, "get_output_embeddings", lambda: None)()
    for module in [*embeddings, unembedding]:
        if module is not None:
            kind = ("embedding", 0, isinstance(module, SparseWeight))
            kinds[id(trained_weight(module))] = kind
    return kinds


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
