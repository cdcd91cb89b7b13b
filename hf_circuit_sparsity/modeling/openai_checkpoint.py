"""Reads OpenAI's release layout, a folder with `beeg_config.json` and `final_model.pt`."""

import os
import re
from pathlib import Path
from typing import Any

import torch

from .configuration_circuitgpt import CircuitGPTConfig
from .modeling_circuitgpt import CircuitGPTForCausalLM
from .validation import ArtifactError, read_json

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
        ArtifactError: (a `ValueError`) a file cannot be read, or the weights do not fit the config.
    """
    config_path = Path(folder) / "beeg_config.json"
    weights_path = Path(folder) / "final_model.pt"
    for path in (config_path, weights_path):
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} was not found; OpenAI's layout is a folder with beeg_config.json and "
                "final_model.pt."
            )
    fields = read_json(config_path).value
    try:
        config = CircuitGPTConfig(**{**OPENAI_DEFAULTS, **fields, **config_overrides})
    except Exception as error:  # transformers raises all kinds on values it does not expect
        reason = str(error).removeprefix("CircuitGPTConfig: ")
        raise ArtifactError(config_path, f": {reason:.500}") from error

    try:
        weights = torch.load(weights_path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged archive or pickle ends in any of them
        raise ArtifactError(
            weights_path,
            " is not a readable PyTorch checkpoint of plain tensors; fetch it again.",
        ) from error
    return config, _fitted(config, weights, weights_path)


def _fitted(
    config: CircuitGPTConfig, weights: dict[str, torch.Tensor], path: Path
) -> dict[str, torch.Tensor]:
    """The weights by our names, complete and of the right shapes, or a `ValueError`."""
    if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights):
        raise ArtifactError(
            path, f" holds {type(weights).__name__}, expected a dict of tensors by their names."
        )
    weights = {name.removeprefix("circuit_model."): tensor for name, tensor in weights.items()}
    with torch.device("meta"):
        expected = CircuitGPTForCausalLM(config).state_dict()
    ignored = CircuitGPTForCausalLM._keys_to_ignore_on_load_unexpected
    for name in set(weights) - set(expected):
        if not any(re.search(pattern, name) for pattern in ignored):
            raise ArtifactError(
                path, f" has {name[:200]!r}, which this config's model does not have."
            )
        del weights[name]
    weights.setdefault("final_logits_bias", torch.zeros(config.vocab_size))
    if config.tied_unembed and "lm_head.weight" in weights:
        weights.setdefault("transformer.wte.weight", weights["lm_head.weight"])
    for name, tensor in expected.items():
        if name not in weights:
            raise ArtifactError(path, f" lacks {name!r}, which this config's model needs.")
        found = weights[name]
        if not isinstance(found, torch.Tensor) or not found.is_floating_point():
            kind = found.dtype if isinstance(found, torch.Tensor) else type(found).__name__
            raise ArtifactError(path, f" has {name!r} of {kind}, expected a tensor of floats.")
        if found.shape != tensor.shape:
            raise ArtifactError(
                path,
                f" has {name!r} of shape {tuple(found.shape)}, but this config needs "
                f"{tuple(tensor.shape)}.",
            )
    return weights
