"""CircuitGPT."""

from torch import nn

from .decoder import register_decoder
from .gpt2 import GPT2Decoder
from .sites import Site


class CircuitGPTDecoder(GPT2Decoder):
    """See [`Decoder`]; parts are named as GPT-2's; sites, positions and AbsTopK are the model's."""

    def node_sites(self) -> dict[str, Site]:
        return self.model.node_sites()

    def logits_site(self) -> nn.Module:
        return self.model.final_logits

    def embed(self, input_ids, attention_mask):
        body = self.model.transformer
        x, positions, mask = body.embedded(body.wte(input_ids), attention_mask)
        return x, {"input_ids": input_ids, "positions": positions, "mask": mask}

    def attention(self, i, x, context):
        return self.blocks[i].after_attention(x, context["positions"], context["mask"])[0]

    def mlp(self, i, x, context):
        return self.blocks[i].after_mlp(x, context["positions"])

    def logits(self, x, context):
        return self.model.unembed(self.final_norm(x), context["input_ids"])

    def add_edit_after_attention(self, i, edit):
        # The stream itself passes through this module, after any nonlinearity.
        module = self.blocks[i].resid_post_attn
        return [module.register_forward_hook(lambda module, args, x: edit(x))]

    def at_last_position(self):
        if self.model.config.d_pos_emb is not None:  # positions beside the stream stay as many
            return []
        block = self.blocks[-1]

        def last_row(module, args, kwargs):
            x, mask, *others = args
            return (x, None if mask is None else mask[..., -1:, :], *others), kwargs

        def last(module, args, x):
            return x[:, -1:]

        return [
            block.attn.register_forward_pre_hook(last_row, with_kwargs=True),
            block.attn.q.register_forward_hook(last),
            block.resid_post_attn.register_forward_hook(last),
        ]


register_decoder("circuitgpt", CircuitGPTDecoder)
