"""Reads OpenAI's release layout, a folder with `beeg_config.json` and `final_model.pt`."""

import json
import os
import pickle
import re
from pathlib import Path
from typing import Any

import torch

from .configuration_circuitgpt import CircuitGPTConfig
from .modeling_circuitgpt import CircuitGPTForCausalLM

# What OpenAI's code assumes where an old config does not say (its `GPTConfig`). Our own defaults
# are the paper's model and would give such a checkpoint another architecture.
OPENAI_DEFAULTS = {
    "block_size": 1024,
    "vocab_size": 50304,
    "n_layer": 12,
    "n_head": 12,
    "d_model": 768,
    "rms_norm": False,
    "afrac": None,
    "afrac_loctypes": "attn_in,attn_out,mlp_in,mlp_out",
    "tied_unembed": True,
    "enable_bigram_table": False,
    "learnable_bigram_table": False,
    "sink": False,
}


def read_openai_checkpoint(
    folder: str | os.PathLike, **config_overrides: Any
) -> tuple[CircuitGPTConfig, dict[str, torch.Tensor]]:
    """Read config and weights, ready for `CircuitGPTForCausalLM(config).load_state_dict`.

    Weights are read with `weights_only=True`: nothing in the file is executed.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: a file cannot be read, or the weights do not fit the config.
    """
    config_path = Path(folder) / "beeg_config.json"
    weights_path = Path(folder) / "final_model.pt"
    for path in (config_path, weights_path):
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} was not found; OpenAI's layout is a folder with beeg_config.json and "
                "final_model.pt."
            )
    try:
        fields = json.loads(config_path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{config_path} is not valid JSON ({error}); fetch it again.") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{config_path} holds {type(fields).__name__}, expected an object.")
    config = CircuitGPTConfig(**{**OPENAI_DEFAULTS, **fields, **config_overrides})

    try:
        weights = torch.load(weights_path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
        raise ValueError(
            f"{weights_path} is not a readable PyTorch checkpoint of plain tensors; fetch it again."
        ) from error
    return config, _fitted(config, weights, weights_path)


def _fitted(
    config: CircuitGPTConfig, weights: dict[str, torch.Tensor], path: Path
) -> dict[str, torch.Tensor]:
    """The weights by our names, complete and of the right shapes, or a `ValueError`."""
    with torch.device("meta"):
        expected = CircuitGPTForCausalLM(config).state_dict()
    if not isinstance(weights, dict):
        raise ValueError(f"{path} holds {type(weights).__name__}, expected a dict of tensors.")
    weights = {name.removeprefix("circuit_model."): tensor for name, tensor in weights.items()}
    ignored = CircuitGPTForCausalLM._keys_to_ignore_on_load_unexpected
    for name in set(weights) - set(expected):
        if not any(re.search(pattern, name) for pattern in ignored):
            raise ValueError(f"{path} has {name!r}, which this config's model does not have.")
        del weights[name]
    weights.setdefault("final_logits_bias", torch.zeros(config.vocab_size))
    if config.tied_unembed and "lm_head.weight" in weights:
        weights.setdefault("transformer.wte.weight", weights["lm_head.weight"])
    for name, tensor in expected.items():
        if name not in weights:
            raise ValueError(f"{path} lacks {name!r}, which this config's model needs.")
        if weights[name].shape != tensor.shape:
            raise ValueError(
                f"{path} has {name!r} of shape {tuple(weights[name].shape)}, but this config "
                f"needs {tuple(tensor.shape)}."
            )
    return weights
