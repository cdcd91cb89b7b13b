"""GPT-2."""

import torch
from torch import nn

from .decoder import Decoder, register_decoder
from .layer import Layer, Part


class GPT2Decoder(Decoder):
    """See [`Decoder`]; queries, keys and values are one matrix.

    Raises:
        ValueError: the model has cross-attention.
    """

    def __init__(self, model: nn.Module):
        if getattr(model.config, "add_cross_attention", False):
            raise ValueError(
                "The GPT-2 model has add_cross_attention=True, but circuits and bridges have no "
                "place for cross-attention; pass a decoder without it."
            )
        super().__init__(model, model.transformer.h, model.transformer.ln_f)

    def layer(self, block: nn.Module) -> Layer:
        query, key, value = torch.arange(3 * self.n_heads * self.head_dim).chunk(3)
        return Layer(
            attn_norm=block.ln_1,
            attention=block.attn,
            query=Part(block.attn.c_attn, query),
            key=Part(block.attn.c_attn, key),
            value=Part(block.attn.c_attn, value),
            attn_out=block.attn.c_proj,
            mlp_norm=block.ln_2,
            mlp=block.mlp,
            up=Part(block.mlp.c_fc),
            down=block.mlp.c_proj,
        )

    @property
    def positions(self) -> torch.Tensor | None:
        table = self.model.transformer.wpe  # a CircuitGPT may have none
        return None if table is None else table.weight


register_decoder("gpt2", GPT2Decoder)
