"""CircuitGPT's residual stream."""

from torch import nn

from .residual_stream import ResidualStream, register_residual_stream


class CircuitGPTStream(ResidualStream):
    """See [`ResidualStream`]; positions and AbsTopK are the model's own."""

    def __init__(self, model: nn.Module):
        super().__init__(model, model.transformer.h, model.transformer.ln_f)

    def embed(self, input_ids, attention_mask):
        body = self.model.transformer
        x, positions, mask = body.embedded(body.wte(input_ids), attention_mask)
        return x, {"input_ids": input_ids, "positions": positions, "mask": mask}

    def attention(self, block, x, context):
        return block.after_attention(x, context["positions"], context["mask"])[0]

    def mlp(self, block, x, context):
        return block.after_mlp(x, context["positions"])

    def logits(self, x, context):
        return self.model.unembed(self.final_norm(x), context["input_ids"])

    def add_edit_after_attention(self, block, edit):
        # The stream itself passes through this module, after any nonlinearity.
        return [block.resid_post_attn.register_forward_hook(lambda module, args, x: edit(x))]


register_residual_stream("circuitgpt", CircuitGPTStream)
