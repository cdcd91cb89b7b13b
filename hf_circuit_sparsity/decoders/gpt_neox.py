"""GPT-NeoX and Pythia."""

import torch
from torch import nn

from .decoder import Decoder, register_decoder
from .layer import Layer, Part


class GPTNeoXDecoder(Decoder):
    """See [`Decoder`]; one matrix has the queries, keys and values of each head in turn."""

    def __init__(self, model: nn.Module):
        super().__init__(model, model.gpt_neox.layers, model.gpt_neox.final_layer_norm)

    def layer(self, block: nn.Module) -> Layer:
        by_head = torch.arange(3 * self.n_heads * self.head_dim).view(self.n_heads, 3, -1)
        query, key, value = (by_head[:, i].flatten() for i in range(3))
        attention, mlp = block.attention, block.mlp
        return Layer(
            attn_norm=block.input_layernorm,
            attention=attention,
            query=Part(attention.query_key_value, query),
            key=Part(attention.query_key_value, key),
            value=Part(attention.query_key_value, value),
            attn_out=attention.dense,
            attn_post=block.post_attention_dropout,
            mlp_norm=block.post_attention_layernorm,
            mlp=mlp,
            up=Part(mlp.dense_h_to_4h),
            down=mlp.dense_4h_to_h,
            mlp_post=block.post_mlp_dropout,
            parallel=block.use_parallel_residual,
        )


register_decoder("gpt_neox", GPTNeoXDecoder)
