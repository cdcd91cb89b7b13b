"""Llama's residual stream."""

from torch import nn

from .residual_stream import ResidualStream, causal_mask, position_ids, register_residual_stream


class LlamaStream(ResidualStream):
    """See [`ResidualStream`]."""

    def __init__(self, model: nn.Module):
        super().__init__(model, model.model.layers, model.model.norm)

    def parts(self, block):
        return block.input_layernorm, block.self_attn, block.post_attention_layernorm, block.mlp

    def embed(self, input_ids, attention_mask):
        body = self.model.model
        positions = position_ids(input_ids, attention_mask)
        x = body.embed_tokens(input_ids)
        return x, {
            "position_ids": positions,
            "position_embeddings": body.rotary_emb(x, position_ids=positions),
            "attention_mask": causal_mask(self.model, x, attention_mask, positions),
        }


register_residual_stream("llama", LlamaStream)
