"""The residual stream of a causal language model: where to read it, edit it and run on from it.

A model of L layers has 2L + 1 locations: 0 after the embedding, 2i + 1 after the attention block of
layer i, 2i + 2 after its MLP block. The forward pass here is the model's own, cut into pieces.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.masking_utils import create_causal_mask

Edit = Callable[[torch.Tensor], torch.Tensor]
Context = dict[str, Any]


class ResidualStream:
    """The residual stream of one model; the base class of one class per architecture.

    A subclass of a pre-norm decoder implements [`parts`] and [`embed`]; any other overrides
    [`attention`], [`mlp`], [`logits`] and [`add_edit_after_attention`] as well.

    Args:
        model: with an `lm_head`.
        blocks: its layers, in order.
        final_norm: the norm before its unembedding.
    """

    def __init__(self, model: nn.Module, blocks: nn.ModuleList, final_norm: nn.Module):
        self.model, self.blocks, self.final_norm = model, blocks, final_norm

    def parts(self, block: nn.Module) -> tuple[nn.Module, nn.Module, nn.Module, nn.Module]:
        """The norm before the attention, the attention, the norm before the MLP, and the MLP."""
        raise NotImplementedError

    def embed(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, Context]:
        """The stream at location 0, `(B, T, D)`, and the keyword arguments of every attention."""
        raise NotImplementedError

    def attention(self, block: nn.Module, x: torch.Tensor, context: Context) -> torch.Tensor:
        """From the stream before the attention of `block` to the stream after it."""
        norm, attention, *_ = self.parts(block)
        return x + attention(norm(x), **context)[0]

    def mlp(self, block: nn.Module, x: torch.Tensor, context: Context) -> torch.Tensor:
        """From the stream before the MLP of `block` to the stream after it."""
        *_, norm, mlp = self.parts(block)
        return x + mlp(norm(x))

    def logits(self, x: torch.Tensor, context: Context) -> torch.Tensor:
        """From the stream at the last location to logits `(B, T, V)`."""
        return self.model.lm_head(self.final_norm(x))

    @property
    def depth(self) -> int:
        """Number of layers L."""
        return len(self.blocks)

    @property
    def n_locations(self) -> int:
        """2L + 1."""
        return 2 * self.depth + 1

    def run(
        self, x: torch.Tensor, context: Context, start: int = 0, stop: int | None = None
    ) -> list[torch.Tensor]:
        """The stream at locations `start` to `stop` (by default the last); `x` is at `start`."""
        stop = self.n_locations - 1 if stop is None else stop
        stream = [x]
        for location in range(start, stop):
            piece = self.mlp if location % 2 else self.attention
            stream.append(piece(self.blocks[location // 2], stream[-1], context))
        return stream

    def add_edit(self, location: int, edit: Edit) -> list[Any]:
        """Insert `edit` at `location` into every forward pass of the model.

        Within `generate`, `edit` sees only the tokens that are not in the cache yet.

        Args:
            location: 0 to 2L.
            edit: `(B, T, D)` to the same shape.

        Returns:
            Hook handles; call `remove()` on each.
        """
        if location % 2:
            return self.add_edit_after_attention(self.blocks[location // 2], edit)
        reader = [*self.blocks, self.final_norm][location // 2]

        def edited(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            if args:
                return (edit(args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": edit(kwargs["hidden_states"])}

        return [reader.register_forward_pre_hook(edited, with_kwargs=True)]

    def add_edit_after_attention(self, block: nn.Module, edit: Edit) -> list[Any]:
        """[`add_edit`] between the attention and the MLP of `block`."""
        # The block adds the attention's output to the stream, so the edit's change can be added to
        # that output.
        norm, attention, *_ = self.parts(block)
        before: list[torch.Tensor] = []

        def remember(module: nn.Module, args: tuple) -> None:
            before[:] = [args[0]]

        def edited(module: nn.Module, args: tuple, output: tuple) -> tuple:
            x = before.pop() + output[0]
            return (output[0] + (edit(x) - x), *output[1:])

        return [norm.register_forward_pre_hook(remember), attention.register_forward_hook(edited)]


_STREAMS: dict[str, type[ResidualStream]] = {}


def register_residual_stream(model_type: str, stream: type[ResidualStream]) -> None:
    """Make an architecture known.

    Args:
        model_type: as in the model's config.
        stream: what [`residual_stream`] returns an instance of.
    """
    _STREAMS[model_type] = stream


def residual_stream(model: nn.Module) -> ResidualStream:
    """The residual stream of a model of a known architecture.

    Raises:
        ValueError: `config.model_type` is not registered.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in _STREAMS:
        raise ValueError(
            f"{type(model).__name__} has model_type {model_type!r}, expected one of "
            f"{', '.join(sorted(_STREAMS))}; for another, implement parts and embed in a "
            "subclass of ResidualStream (see LlamaStream) and call "
            "register_residual_stream(model_type, subclass)."
        )
    return _STREAMS[model_type](model)


def position_ids(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Positions `(B or 1, T)`; padding, on either side, is not counted."""
    if attention_mask is None:
        return torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def causal_mask(
    model: nn.Module, x: torch.Tensor, attention_mask: torch.Tensor | None, positions: torch.Tensor
) -> torch.Tensor | None:
    """The mask that a model of transformers makes before its first layer."""
    return create_causal_mask(
        config=model.config,
        inputs_embeds=x,
        attention_mask=attention_mask,
        past_key_values=None,
        position_ids=positions,
    )
