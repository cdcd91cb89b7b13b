"""Llama's residual stream."""

from torch import nn

from .residual_stream import ResidualStream, causal_mask, position_ids, register_residual_stream


class LlamaStream(ResidualStream):
    """See [`ResidualStream`]."""

    @property
    def blocks(self) -> nn.ModuleList:
        return self.model.model.layers

    def embed(self, input_ids, attention_mask):
        body = self.model.model
        positions = position_ids(input_ids, attention_mask)
        x = body.embed_tokens(input_ids)
        return x, {
            "position_ids": positions,
            "position_embeddings": body.rotary_emb(x, position_ids=positions),
            "attention_mask": causal_mask(self.model, x, attention_mask, positions),
        }

    def attention(self, block, x, context):
        return x + block.self_attn(hidden_states=block.input_layernorm(x), **context)[0]

    def mlp(self, block, x, context):
        return x + block.mlp(block.post_attention_layernorm(x))

    def logits(self, x, context):
        return self.model.lm_head(self.model.model.norm(x))

    def attention_parts(self, block):
        return block.input_layernorm, block.self_attn


register_residual_stream("llama", LlamaStream)
