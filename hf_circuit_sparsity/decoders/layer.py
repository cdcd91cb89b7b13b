"""What a layer of a decoder consists of, and the weights between its node sites."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..modeling.causal_lm import TRANSPOSED_LAYERS


@dataclass(frozen=True)
class Target:
    """Part of what a [`Projection`] writes.

    Attributes:
        site: the site whose nodes are written.
        rows: the layer's output of each node, int64 `(width,)`; `None` is all outputs in order.
        gate: whether these are the inputs of the nodes' gates (act(gate) × up), so that the nodes
            have other weights as well.
    """

    site: str
    rows: Tensor | None = None
    gate: bool = False


@dataclass(frozen=True)
class Projection:
    """A linear layer between node sites.

    Attributes:
        module: an `nn.Linear`, a `Conv1D` or a layer that runs on its nonzeros.
        source: the site it reads.
        targets: what it writes.
        columns: the node of the source that each of its inputs carries, int64; `None` is all nodes
            in order. With grouped keys and values a value channel is read once per query head.
    """

    module: nn.Module
    source: str
    targets: tuple[Target, ...]
    columns: Tensor | None = None

    def weight(self) -> Tensor:
        """`(outputs, inputs)`, a view where it can be."""
        weight = self.module.weight  # a sparse layer makes it anew each time
        return weight.T if isinstance(self.module, TRANSPOSED_LAYERS) else weight


class Part(NamedTuple):
    """Some outputs of a linear layer.

    Attributes:
        module: the layer.
        rows: which of its outputs, int64 `(width,)`; `None` is all of them in order.
    """

    module: nn.Module
    rows: Tensor | None = None


@dataclass(frozen=True)
class Layer:
    """What one layer of a pre-norm decoder consists of.

    Attributes:
        attn_norm: the norm before the attention.
        attention: the attention; what it returns, or the first of it, goes to the stream.
        query, key, value: what writes them, before rotary positions and norms of their own.
        attn_out: the attention's output projection.
        mlp_norm: the norm before the MLP.
        mlp: the MLP.
        up: what writes the neurons.
        down: the linear layer that reads them.
        gate: in a gated MLP, whose neurons are act(gate) × up, what writes the gates.
        attn_post: a module between the attention and the stream, as a second norm.
        mlp_post: a module between the MLP and the stream.
        parallel: the MLP reads what the attention reads; there is no stream between them.
    """

    attn_norm: nn.Module
    attention: nn.Module
    query: Part
    key: Part
    value: Part
    attn_out: nn.Module
    mlp_norm: nn.Module
    mlp: nn.Module
    up: Part
    down: nn.Module
    gate: Part | None = None
    attn_post: nn.Module | None = None
    mlp_post: nn.Module | None = None
    parallel: bool = False


def in_features(linear: nn.Module) -> int:
    """How many inputs an `nn.Linear`, a `Conv1D` or a layer that runs on its nonzeros has."""
    return linear.nx if isinstance(linear, Conv1D) else linear.in_features
