"""Where the residual stream of a causal language model can be read, and how to run on from there.

A model of L layers has 2L + 1 locations: 0 after the embedding, 2i + 1 after the attention block of
layer i, 2i + 2 after its MLP block. One class per architecture; [`register_residual_stream`] adds
others. Its forward pass is the model's own, cut into pieces, and the tests hold one against the
other.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.masking_utils import create_causal_mask

Edit = Callable[[torch.Tensor], torch.Tensor]


class ResidualStream:
    """The residual stream of one model: base class, and what GPT-2 and Llama have in common.

    A subclass says where the blocks are and gives [`embed`], [`attention`], [`mlp`] and
    [`logits`]. `context` is whatever `embed` found out that the later pieces need.
    """

    def __init__(self, model: nn.Module):
        self.model = model

    @property
    def blocks(self) -> nn.ModuleList:
        """The layers, in order."""
        raise NotImplementedError

    def embed(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """The stream at location 0, `(B, T, D)`, and the context."""
        raise NotImplementedError

    def attention(self, block: nn.Module, x: torch.Tensor, context: dict[str, Any]) -> torch.Tensor:
        """From the stream before the attention of `block` to the one after it."""
        raise NotImplementedError

    def mlp(self, block: nn.Module, x: torch.Tensor, context: dict[str, Any]) -> torch.Tensor:
        """From the stream before the MLP of `block` to the one after it."""
        raise NotImplementedError

    def logits(self, x: torch.Tensor, context: dict[str, Any]) -> torch.Tensor:
        """From the stream at the last location to `(B, T, V)`."""
        raise NotImplementedError

    def attention_parts(self, block: nn.Module) -> tuple[nn.Module, nn.Module]:
        """The norm that reads the stream for the attention, and the attention itself."""
        raise NotImplementedError

    @property
    def depth(self) -> int:
        """Number of layers L."""
        return len(self.blocks)

    @property
    def n_locations(self) -> int:
        """2L + 1."""
        return 2 * self.depth + 1

    def run(
        self,
        x: torch.Tensor,
        context: dict[str, Any],
        start: int = 0,
        stop: int | None = None,
    ) -> list[torch.Tensor]:
        """The stream at the locations `start` to `stop` (the last), given it at `start` as `x`."""
        stop = self.n_locations - 1 if stop is None else stop
        stream = [x]
        for location in range(start, stop):
            piece = self.mlp if location % 2 else self.attention
            stream.append(piece(self.blocks[location // 2], stream[-1], context))
        return stream

    def add_edit(self, location: int, edit: Edit) -> list[Any]:
        """Put `edit` between the stream at `location` and everything behind it in the model.

        It works in every forward pass of the model, so also within `generate`, where it sees only
        the tokens that are not in the cache.

        Args:
            edit: `(B, T, D)` to the same shape.

        Returns:
            The hooks' handles; `remove()` each.
        """
        if location == 0:
            return [self.blocks[0].register_forward_pre_hook(_edits_input(edit), with_kwargs=True)]
        if location % 2 == 0:
            return [self.blocks[location // 2 - 1].register_forward_hook(_edits_output(edit))]
        return self.add_edit_after_attention(self.blocks[location // 2], edit)

    def add_edit_after_attention(self, block: nn.Module, edit: Edit) -> list[Any]:
        """[`add_edit`] between attention and MLP of a block."""
        # The block adds the attention's output to the stream; so does what is added to the output.
        norm, attention = self.attention_parts(block)
        before: list[torch.Tensor] = []

        def remember(module: nn.Module, args: tuple) -> None:
            before[:] = [args[0]]

        def edited(delta: torch.Tensor) -> torch.Tensor:
            x = before.pop() + delta
            return delta + (edit(x) - x)

        return [
            norm.register_forward_pre_hook(remember),
            attention.register_forward_hook(_edits_output(edited)),
        ]


class CircuitGPTStream(ResidualStream):
    @property
    def blocks(self) -> nn.ModuleList:
        return self.model.transformer.h

    def embed(self, input_ids, attention_mask):
        body = self.model.transformer
        x, positions, mask = body.embedded(body.wte(input_ids), attention_mask)
        return x, {"input_ids": input_ids, "positions": positions, "mask": mask}

    def attention(self, block, x, context):
        return block.after_attention(x, context["positions"], context["mask"])[0]

    def mlp(self, block, x, context):
        return block.after_mlp(x, context["positions"])

    def logits(self, x, context):
        return self.model.unembed(self.model.transformer.ln_f(x), context["input_ids"])

    def add_edit_after_attention(self, block, edit):
        # The stream itself passes through this module, behind any nonlinearity.
        return [block.resid_post_attn.register_forward_hook(_edits_output(edit))]


class GPT2Stream(ResidualStream):
    def __init__(self, model: nn.Module):
        super().__init__(model)
        if getattr(model.config, "add_cross_attention", False):
            raise ValueError(
                "The GPT-2 model has cross-attention (add_cross_attention=True), which has no "
                "place among the 2L + 1 locations; pass a decoder without it."
            )

    @property
    def blocks(self) -> nn.ModuleList:
        return self.model.transformer.h

    def embed(self, input_ids, attention_mask):
        body = self.model.transformer
        positions = position_ids(input_ids, attention_mask)
        x = body.drop(body.wte(input_ids) + body.wpe(positions))
        mask = create_causal_mask(
            config=self.model.config,
            inputs_embeds=x,
            attention_mask=attention_mask,
            past_key_values=None,
            position_ids=positions,
        )
        return x, {"mask": mask}

    def attention(self, block, x, context):
        return x + block.attn(block.ln_1(x), attention_mask=context["mask"])[0]

    def mlp(self, block, x, context):
        return x + block.mlp(block.ln_2(x))

    def logits(self, x, context):
        return self.model.lm_head(self.model.transformer.ln_f(x))

    def attention_parts(self, block):
        return block.ln_1, block.attn


class LlamaStream(ResidualStream):
    @property
    def blocks(self) -> nn.ModuleList:
        return self.model.model.layers

    def embed(self, input_ids, attention_mask):
        body = self.model.model
        positions = position_ids(input_ids, attention_mask)
        x = body.embed_tokens(input_ids)
        mask = create_causal_mask(
            config=self.model.config,
            inputs_embeds=x,
            attention_mask=attention_mask,
            past_key_values=None,
            position_ids=positions,
        )
        return x, {
            "position_ids": positions,
            "position_embeddings": body.rotary_emb(x, position_ids=positions),
            "attention_mask": mask,
        }

    def attention(self, block, x, context):
        return x + block.self_attn(hidden_states=block.input_layernorm(x), **context)[0]

    def mlp(self, block, x, context):
        return x + block.mlp(block.post_attention_layernorm(x))

    def logits(self, x, context):
        return self.model.lm_head(self.model.model.norm(x))

    def attention_parts(self, block):
        return block.input_layernorm, block.self_attn


_STREAMS: dict[str, type[ResidualStream]] = {
    "circuitgpt": CircuitGPTStream,
    "gpt2": GPT2Stream,
    "llama": LlamaStream,
}


def register_residual_stream(model_type: str, stream: type[ResidualStream]) -> None:
    """Make another architecture known, by the `model_type` of its config."""
    _STREAMS[model_type] = stream


def residual_stream(model: nn.Module) -> ResidualStream:
    """The residual stream of a model of a known architecture.

    Raises:
        ValueError: its `config.model_type` is not known; says which are, and what to implement.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in _STREAMS:
        raise ValueError(
            f"{type(model).__name__} has model_type {model_type!r}, but the residual streams known "
            f"are those of {', '.join(sorted(_STREAMS))}; for another, write a subclass of "
            "ResidualStream with blocks, embed, attention, mlp, logits and attention_parts (see "
            "LlamaStream) and call register_residual_stream(model_type, it)."
        )
    return _STREAMS[model_type](model)


def position_ids(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Positions `(B or 1, T)`; padding, on either side, does not count."""
    if attention_mask is None:
        return torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def _edits_input(edit: Edit) -> Callable:
    def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args:
            return (edit(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": edit(kwargs["hidden_states"])}

    return hook


def _edits_output(edit: Edit) -> Callable:
    def hook(module: nn.Module, args: tuple, output: Any) -> Any:
        if isinstance(output, tuple):
            return (edit(output[0]), *output[1:])
        return edit(output)

    return hook


__all__ = ["ResidualStream", "register_residual_stream", "residual_stream"]
