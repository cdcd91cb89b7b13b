"""CircuitGPT."""

import torch
from torch import nn

from .decoder import Decoder, Layer, Part, Site, register_decoder


class CircuitGPTDecoder(Decoder):
    """See [`Decoder`]; node sites, positions and AbsTopK are the model's own."""

    def __init__(self, model: nn.Module):
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

    def node_sites(self) -> dict[str, Site]:
        return self.model.node_sites()

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


register_decoder("circuitgpt", CircuitGPTDecoder)
