"""Llama and the models that are built like it: Mistral, Qwen 2 and 3, Gemma 2 and 3, SmolLM."""

from dataclasses import replace

from torch import nn

from .decoder import Decoder, register_decoder
from .layer import Layer, Part


class LlamaDecoder(Decoder):
    """See [`Decoder`]; gated MLPs, grouped keys and values, rotary positions."""

    def __init__(self, model: nn.Module):
        super().__init__(model, model.model.layers, model.model.norm)

    def layer(self, block: nn.Module) -> Layer:
        attention, mlp = block.self_attn, block.mlp
        return Layer(
            attn_norm=block.input_layernorm,
            attention=attention,
            query=Part(attention.q_proj),
            key=Part(attention.k_proj),
            value=Part(attention.v_proj),
            attn_out=attention.o_proj,
            mlp_norm=block.post_attention_layernorm,
            mlp=mlp,
            up=Part(mlp.up_proj),
            gate=Part(mlp.gate_proj),
            down=mlp.down_proj,
        )


class GemmaDecoder(LlamaDecoder):
    """See [`LlamaDecoder`]; a second norm after the attention and after the MLP."""

    def layer(self, block: nn.Module) -> Layer:
        return replace(
            super().layer(block),
            attn_post=block.post_attention_layernorm,
            mlp_norm=block.pre_feedforward_layernorm,
            mlp_post=block.post_feedforward_layernorm,
        )


for model_type in ("llama", "mistral", "qwen2", "qwen3"):
    register_decoder(model_type, LlamaDecoder)
for model_type in ("gemma2", "gemma3_text"):
    register_decoder(model_type, GemmaDecoder)
