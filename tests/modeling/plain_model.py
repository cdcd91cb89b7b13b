"""CircuitGPT's forward pass a second time, as plain functions over a state dict.

Written from METHOD's description and without the model's code, for the tests to hold the model
against where OpenAI's reference files do not use a switch.
"""

import math

import torch


def keep_largest(x, fraction):
    k = int(fraction * x.shape[-1])
    threshold = x.abs().sort(dim=-1, descending=True).values[..., k - 1 : k]
    return torch.where(x.abs() >= threshold, x, torch.zeros(()))


def plain_logits(config, weights, ids):
    def linear(name, x):
        y = x @ weights[f"{name}.weight"].T
        return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y

    def norm(name, x):
        if config.rms_norm:
            x = x / (x.pow(2).mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()
            return x * weights[f"{name}.weight"]
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weights[f"{name}.weight"]
        return x + weights[f"{name}.bias"] if f"{name}.bias" in weights else x

    def sparse(site, x):
        return keep_largest(x, config.afrac) if config.site_k(site) is not None else x

    def act(x):
        if config.activation_type == "relu":
            return x.clamp(min=0)
        return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))

    def residual(x):
        return x.clamp(min=0) if config.residual_activation_type == "relu" else x

    def attention(name, x):
        inner = config.n_head * config.d_head
        q, k, v = linear(f"{name}.c_attn", sparse("attn_in", x)).split(inner, dim=-1)
        q, k, v = sparse("attn_q", q), sparse("attn_k", k), sparse("attn_v", v)
        out = torch.zeros_like(q)
        for head in range(config.n_head):
            channels = slice(head * config.d_head, (head + 1) * config.d_head)
            for b in range(len(ids)):
                for t in range(ids.shape[1]):
                    scores = k[b, : t + 1, channels] @ q[b, t, channels] / config.d_head**0.5
                    exps = scores.exp()
                    total = exps.sum()
                    if config.sink:
                        total = total + weights[f"{name}.attn_imp.sink_logit"][head].exp()
                    out[b, t, channels] = (exps / total) @ v[b, : t + 1, channels]
        return sparse("attn_out", linear(f"{name}.c_proj", out))

    x = weights["transformer.wte.weight"][ids]
    if config.use_positional_embeddings:
        positions = weights["transformer.wpe.weight"][: ids.shape[1]].expand(len(ids), -1, -1)
        x = x + positions if config.d_pos_emb is None else x
    for i in range(config.n_layer):
        block = f"transformer.h.{i}"
        read = norm(f"{block}.ln_1", x)
        if config.d_pos_emb is not None:
            read = torch.cat([read, norm(f"{block}.ln_p1", positions)], dim=-1)
        x = residual(x + attention(f"{block}.attn", read))
        x = sparse("resid_post_attn", x)
        read = norm(f"{block}.ln_2", x)
        if config.d_pos_emb is not None:
            read = torch.cat([read, norm(f"{block}.ln_p2", positions)], dim=-1)
        neurons = sparse("mlp_neuron", act(linear(f"{block}.mlp.c_fc", sparse("mlp_in", read))))
        x = residual(x + sparse("mlp_out", linear(f"{block}.mlp.c_proj", neurons)))
        x = sparse("resid_post_mlp", x)
    logits = norm("transformer.ln_f", x) @ weights["lm_head.weight"].T
    logits = logits + weights["final_logits_bias"]
    return logits + weights["bigram_table"][ids] if config.enable_bigram_table else logits
