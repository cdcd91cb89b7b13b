"""One description per architecture: where a decoder's nodes, weights and residual stream are.

A decoder of L layers has eight node sites per layer (Gao et al. 2025, section 2), named as
`h.0.attn.act_in`, and 2L + 1 locations of its residual stream: 0 after the embedding, 2i + 1 after
the attention block of layer i, 2i + 2 after its MLP block. Circuits are cut at the sites, and their
edges are the weights between them; bridges read and edit the stream. All of it is the model's own
forward pass, read by hooks.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .hooks import temporary_hooks
from .layer import Layer, Part, Projection, Target, in_features
from .sites import InputSite, LogitsSite, OutputSite, Site, soft_capped

Edit = Callable[[Tensor], Tensor]
Context = dict[str, Any]


class _Reached(Exception):
    """Ends a layer's forward pass where the stream after its attention is known."""

    def __init__(self, stream: Tensor):
        self.stream = stream


class Decoder:
    """Where the nodes, the weights and the residual stream of one model are.

    The base class of one class per architecture. A subclass for a pre-norm decoder of transformers
    says where the layers are and implements [`layer`]; `docs/decoders.md` has one of 40 lines.

    Args:
        model: a causal language model with an output embedding.
        blocks: its layers, in order.
        final_norm: the norm before its unembedding.
    """

    def __init__(self, model: nn.Module, blocks: nn.ModuleList, final_norm: nn.Module):
        self.model, self.blocks, self.final_norm = model, blocks, final_norm

    def layer(self, block: nn.Module) -> Layer:
        """The parts of one of the blocks."""
        raise NotImplementedError

    # Heads.

    @property
    def n_heads(self) -> int:
        """Query heads per layer."""
        return self.model.config.num_attention_heads

    @property
    def head_dim(self) -> int:
        """Channels per head."""
        config = self.model.config
        return getattr(config, "head_dim", None) or config.hidden_size // self.n_heads

    @property
    def n_key_value_heads(self) -> int:
        """Heads of keys and values per layer; query heads share them in equal groups."""
        return getattr(self.model.config, "num_key_value_heads", None) or self.n_heads

    @property
    def positions(self) -> Tensor | None:
        """What is added to the stream for each position, `(positions, D)`; `None` if nothing is."""
        return None

    # Nodes and weights.

    @cached_property
    def layers(self) -> list[Layer]:
        """The parts of every block."""
        return [self.layer(block) for block in self.blocks]

    def node_sites(self) -> dict[str, Site]:
        """Every place where a circuit can be cut, in the order of computation.

        Keys: `h.{i}.attn.act_in, .q, .k, .v, .resid_delta` and `h.{i}.mlp.act_in, .post_act,
        .resid_delta`. Queries and keys are those before rotary positions and their norms.
        """
        inner = self.n_heads * self.head_dim
        shared = self.n_key_value_heads * self.head_dim
        sites: dict[str, Site] = {}
        for i, layer in enumerate(self.layers):
            width, neurons = (in_features(m) for m in (layer.query.module, layer.down))
            sites |= {
                f"h.{i}.attn.act_in": OutputSite(layer.attn_norm, width),
                f"h.{i}.attn.q": OutputSite(layer.query.module, inner, layer.query.rows),
                f"h.{i}.attn.k": OutputSite(layer.key.module, shared, layer.key.rows),
                f"h.{i}.attn.v": OutputSite(layer.value.module, shared, layer.value.rows),
                f"h.{i}.attn.resid_delta": OutputSite(layer.attn_out, width),
                f"h.{i}.mlp.act_in": OutputSite(layer.mlp_norm, width),
                f"h.{i}.mlp.post_act": InputSite(layer.down, neurons),
                f"h.{i}.mlp.resid_delta": OutputSite(layer.down, width),
            }
        return sites

    def logits_site(self) -> nn.Module | LogitsSite:
        """Where hooks see the logits before the loss does."""
        return LogitsSite(self.model)

    def projections(self) -> list[Projection]:
        """Every linear layer between node sites."""
        groups = self.n_heads // self.n_key_value_heads
        by_head = torch.arange(self.n_key_value_heads * self.head_dim).view(-1, self.head_dim)
        attended = by_head.repeat_interleave(groups, 0).flatten() if groups > 1 else None
        projections = []
        for i, layer in enumerate(self.layers):
            attn, mlp = f"h.{i}.attn", f"h.{i}.mlp"
            qkv = {"q": layer.query, "k": layer.key, "v": layer.value}
            neurons = [(layer.up, Target(f"{mlp}.post_act", layer.up.rows))]
            if layer.gate is not None:
                gates = Target(f"{mlp}.post_act", layer.gate.rows, gate=True)
                neurons.append((layer.gate, gates))
            projections += [
                *_read_by(
                    f"{attn}.act_in",
                    [(part, Target(f"{attn}.{name}", part.rows)) for name, part in qkv.items()],
                ),
                # Attention mixes positions, not channels: what it reads on a channel is v's.
                Projection(layer.attn_out, f"{attn}.v", (Target(f"{attn}.resid_delta"),), attended),
                *_read_by(f"{mlp}.act_in", neurons),
                Projection(layer.down, f"{mlp}.post_act", (Target(f"{mlp}.resid_delta"),)),
            ]
        return projections

    # The residual stream.

    @property
    def depth(self) -> int:
        """Number of layers L."""
        return len(self.blocks)

    @property
    def n_locations(self) -> int:
        """2L + 1."""
        return 2 * self.depth + 1

    def check_sequential(self) -> None:
        """Raise a `ValueError` if the layers are parallel, so that bridges cannot enter them."""
        if any(layer.parallel for layer in self.layers):
            raise ValueError(
                f"{type(self.model).__name__} has parallel layers, without a residual stream "
                "between attention and MLP; pass a model whose MLP comes after the attention."
            )

    def embed(self, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Context]:
        """The stream at location 0, `(B, T, D)`, and what every layer is given beside it.

        Raises:
            ValueError: the layers are parallel.
        """
        self.check_sequential()
        with _passed_over(self.blocks) as given:
            self.model.base_model(
                input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids(input_ids, attention_mask),
                use_cache=False,
            )
        return given[0][0], {"given": given}

    def attention(self, i: int, x: Tensor, context: Context) -> Tensor:
        """From the stream before the attention of layer `i` to the stream after it."""

        def reached(module: nn.Module, args: tuple) -> None:
            raise _Reached(args[0])

        _, args, kwargs = context["given"][i]
        try:
            with temporary_hooks([self.layers[i].mlp_norm.register_forward_pre_hook(reached)]):
                self.blocks[i](x, *args, **kwargs)
        except _Reached as end:
            return end.stream
        raise RuntimeError(f"Layer {i} never called its mlp_norm; see {type(self).__name__}.layer.")

    def mlp(self, i: int, x: Tensor, context: Context) -> Tensor:
        """From the stream before the MLP of layer `i` to the stream after it."""
        layer = self.layers[i]
        delta = layer.mlp(layer.mlp_norm(x))
        return x + (delta if layer.mlp_post is None else layer.mlp_post(delta))

    def logits(self, x: Tensor, context: Context) -> Tensor:
        """From the stream at the last location to logits `(B, T, V)`."""
        logits = self.model.get_output_embeddings()(self.final_norm(x))
        return soft_capped(logits, getattr(self.model.config, "final_logit_softcapping", None))

    def at_last_position(self) -> list[RemovableHandle]:
        """Let the last layer compute what only the last position's logits need, as far as that can
        be had; what else it puts out is then missing.

        Returns:
            Hook handles; call `remove()` on each.
        """
        return []

    def run(
        self, x: Tensor, context: Context, start: int = 0, stop: int | None = None
    ) -> list[Tensor]:
        """The stream at locations `start` to `stop` (by default the last); `x` is at `start`."""
        stop = self.n_locations - 1 if stop is None else stop
        stream = [x]
        for location in range(start, stop):
            piece = self.mlp if location % 2 else self.attention
            stream.append(piece(location // 2, stream[-1], context))
        return stream

    def add_edit(self, location: int, edit: Edit) -> list[RemovableHandle]:
        """Insert `edit` at `location` into every forward pass of the model.

        Within `generate`, `edit` sees only the tokens that are not in the cache yet.

        Args:
            location: 0 to 2L.
            edit: `(B, T, D)` to the same shape.

        Returns:
            Hook handles; call `remove()` on each.

        Raises:
            ValueError: the layers are parallel.
        """
        self.check_sequential()
        if location % 2:
            return self.add_edit_after_attention(location // 2, edit)
        reader = [*self.blocks, self.final_norm][location // 2]

        def edited(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            if args:
                return (edit(args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": edit(kwargs["hidden_states"])}

        return [reader.register_forward_pre_hook(edited, with_kwargs=True)]

    def add_edit_after_attention(self, i: int, edit: Edit) -> list[RemovableHandle]:
        """[`add_edit`] between the attention and the MLP of layer `i`."""
        # The layer adds the attention's output to the stream, so the edit's change can be added to
        # that output.
        layer = self.layers[i]
        before: list[Tensor] = []

        def remember(module: nn.Module, args: tuple) -> None:
            before[:] = [args[0]]

        def edited(module: nn.Module, args: tuple, output: Tensor | tuple) -> Tensor | tuple:
            delta, *rest = output if isinstance(output, tuple) else (output,)
            x = before.pop() + delta
            delta = delta + (edit(x) - x)
            return (delta, *rest) if isinstance(output, tuple) else delta

        return [
            layer.attn_norm.register_forward_pre_hook(remember),
            (layer.attn_post or layer.attention).register_forward_hook(edited),
        ]


def _read_by(source: str, written: list[tuple[Part, Target]]) -> list[Projection]:
    """The layers that read a site; one that writes several parts is one projection."""
    targets: dict[nn.Module, tuple[Target, ...]] = {}
    for part, target in written:
        targets[part.module] = (*targets.get(part.module, ()), target)
    return [Projection(module, source, parts) for module, parts in targets.items()]


@contextmanager
def _passed_over(blocks: nn.ModuleList) -> Iterator[list[tuple[Tensor, tuple, dict[str, Any]]]]:
    """Within the block, layers return the stream as it comes; yields what each was given."""
    given: list[tuple[Tensor, tuple, dict[str, Any]]] = []

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        given.append((hidden_states, args, kwargs))
        return hidden_states

    before = [block.__dict__.get("forward") for block in blocks]
    try:
        for block in blocks:
            block.forward = forward
        with temporary_hooks([]):  # a compiled forward pass would not know it either
            yield given
    finally:
        for block, own in zip(blocks, before, strict=True):
            del block.forward
            if own is not None:  # as accelerate sets it
                block.forward = own


def position_ids(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Positions `(B or 1, T)`; padding, on either side, is not counted."""
    if attention_mask is None:
        return torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


_DECODERS: dict[str, Callable[[nn.Module], Decoder]] = {}


def register_decoder(model_type: str, decoder: Callable[[nn.Module], Decoder]) -> None:
    """Make an architecture known to circuits and bridges.

    Args:
        model_type: as in the model's config.
        decoder: makes the description of a model, as a subclass of [`Decoder`] does.
    """
    _DECODERS[model_type] = decoder


def decoder_of(model: nn.Module) -> Decoder:
    """The description of a model of a known architecture.

    Raises:
        ValueError: `config.model_type` is not registered.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    check_registered(model_type, type(model).__name__)
    return _DECODERS[model_type](model)


def check_registered(model_type: str | None, what: str) -> None:
    """Raise a `ValueError` unless the architecture is known.

    Args:
        model_type: as in a model's config.
        what: has it, for people.
    """
    if model_type not in _DECODERS:
        raise ValueError(
            f"{what} has model_type {model_type!r}, expected one of "
            f"{', '.join(sorted(_DECODERS))}; for another, implement layer in a subclass of "
            "Decoder (see LlamaDecoder) and call register_decoder(model_type, subclass)."
        )
