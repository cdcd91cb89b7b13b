"""CircuitGPT's residual stream."""

from torch import nn

from .residual_stream import ResidualStream, edits_output, register_residual_stream


class CircuitGPTStream(ResidualStream):
    """See [`ResidualStream`]."""

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
        # The stream itself passes through this module, after any nonlinearity.
        return [block.resid_post_attn.register_forward_hook(edits_output(edit))]


register_residual_stream("circuitgpt", CircuitGPTStream)
