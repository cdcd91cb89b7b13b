"""GPT-2's residual stream."""

from torch import nn

from .residual_stream import ResidualStream, causal_mask, position_ids, register_residual_stream


class GPT2Stream(ResidualStream):
    """See [`ResidualStream`].

    Raises:
        ValueError: the model has cross-attention.
    """

    def __init__(self, model: nn.Module):
        if getattr(model.config, "add_cross_attention", False):
            raise ValueError(
                "The GPT-2 model has add_cross_attention=True, but the 2L + 1 locations have no "
                "place for cross-attention; pass a decoder without it."
            )
        super().__init__(model, model.transformer.h, model.transformer.ln_f)

    def parts(self, block):
        return block.ln_1, block.attn, block.ln_2, block.mlp

    def embed(self, input_ids, attention_mask):
        body = self.model.transformer
        positions = position_ids(input_ids, attention_mask)
        x = body.drop(body.wte(input_ids) + body.wpe(positions))
        return x, {"attention_mask": causal_mask(self.model, x, attention_mask, positions)}


register_residual_stream("gpt2", GPT2Stream)
