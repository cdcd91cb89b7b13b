"""Small dense models of every architecture that bridges know, none of whose weights is neutral."""

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

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


def gpt2(**fields) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"n_positions": 32, "n_embd": 24, "n_layer": 2, "n_head": 2, "vocab_size": 64}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    return shaken(GPT2LMHeadModel(GPT2Config(**{**sizes, **ends, **fields})))


def llama(**fields) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=False,
        **fields,
    )
    return shaken(LlamaForCausalLM(config))


def circuitgpt(**fields) -> CircuitGPTForCausalLM:
    sizes = {"n_layer": 2, "n_head": 4, "d_head": 8, "d_model": 32, "d_mlp": 64}
    return random_model(CircuitGPTConfig(**{**sizes, "block_size": 32, "vocab_size": 64, **fields}))


DENSE = {"circuitgpt": circuitgpt, "gpt2": gpt2, "llama": llama}
