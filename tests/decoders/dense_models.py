"""Small models of every architecture that is described, none of whose weights is neutral."""

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from hf_circuit_sparsity.modeling.configuration_circuitgpt import CircuitGPTConfig
from hf_circuit_sparsity.modeling.modeling_circuitgpt import CircuitGPTForCausalLM
from tests.conftest import random_model


def shaken(model: nn.Module) -> nn.Module:
    """Move every weight, so that no piece is close to doing nothing."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


_SIZES = {
    "vocab_size": 64,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
# Layers of both kinds, in reach of twelve tokens.
_WINDOW = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
_GROUPED = {"num_key_value_heads": 1, "tie_word_embeddings": False}


def from_config(model_type: str, **fields) -> nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**_SIZES, **fields})
    return shaken(AutoModelForCausalLM.from_config(config))


def gpt2(**fields) -> nn.Module:
    sizes = {"n_positions": 32, "n_embd": 24, "n_layer": 2, "n_head": 2}
    torch.manual_seed(0)
    ends = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 0}
    config = AutoConfig.for_model("gpt2", **{**sizes, **ends, **fields})
    return shaken(AutoModelForCausalLM.from_config(config))


def llama(**fields) -> nn.Module:
    return from_config("llama", **{**_GROUPED, **fields})


def circuitgpt(**fields) -> CircuitGPTForCausalLM:
    sizes = {"n_layer": 2, "n_head": 4, "d_head": 8, "d_model": 32, "d_mlp": 64}
    return random_model(CircuitGPTConfig(**{**sizes, "block_size": 32, "vocab_size": 64, **fields}))


DENSE = {
    "circuitgpt": circuitgpt,
    "gpt2": gpt2,
    "llama": llama,
    "llama with four heads on two keys": lambda: llama(
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, attention_bias=True
    ),
    "mistral": lambda: from_config("mistral", **{**_GROUPED, "sliding_window": 4}),
    "qwen2": lambda: from_config("qwen2", **_GROUPED, **_WINDOW, use_sliding_window=True),
    "qwen3": lambda: from_config("qwen3", **_GROUPED, head_dim=16),
    "gemma2": lambda: from_config("gemma2", **_GROUPED, **_WINDOW, head_dim=16),
    "gemma3_text": lambda: from_config("gemma3_text", **_GROUPED, **_WINDOW, head_dim=16),
    "gpt_neox": lambda: from_config("gpt_neox", use_parallel_residual=False),
}
# Described in docs/decoders.md.
PHI3 = {"phi3": lambda: from_config("phi3", **_GROUPED, pad_token_id=0)}
PARALLEL = {"gpt_neox with parallel layers": lambda: from_config("gpt_neox")}
