"""Reads OpenAI's release layout, a folder with `beeg_config.json` and `final_model.pt`."""

import os
import re
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from .configuration_circuitgpt import ArtifactError
from .validation import read_json

Model = TypeVar("Model", bound=PreTrainedModel)

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


def load_openai_checkpoint(
    model_class: type[Model], folder: str | os.PathLike, **config_overrides: Any
) -> Model:
    """The model in OpenAI's layout; see `CircuitGPTForCausalLM.from_openai`.

    Weights are read with `weights_only=True`: nothing in the file is executed.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ArtifactError: a file cannot be read, or the weights do not fit the config.
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
        config = model_class.config_class(**{**OPENAI_DEFAULTS, **fields, **config_overrides})
    except Exception as error:  # transformers raises all kinds on values it does not expect
        raise ArtifactError(config_path, f": {error!s:.500}") from error

    weights = read_pickle(weights_path)
    with torch.device("meta"):
        model = model_class(config)
    weights = {name.removeprefix("circuit_model."): tensor for name, tensor in weights.items()}
    model.load_state_dict(checked_weights(model, weights, weights_path), assign=True)
    model.tie_weights()
    return model.eval()


def read_pickle(path: str | os.PathLike) -> dict[str, Any]:
    """A dictionary by names that PyTorch has saved. Nothing in the file is executed.

    Raises:
        ArtifactError: it is damaged, or holds anything else.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged archive or pickle ends in any of them
        raise ArtifactError(
            path, " is not a readable PyTorch checkpoint of plain tensors; fetch it again."
        ) from error
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise ArtifactError(
            path, f" holds {type(content).__name__}, expected a dict of tensors by their names."
        )
    return content


def checked_weights(
    model: PreTrainedModel, weights: dict[str, Any], path: str | os.PathLike
) -> dict[str, torch.Tensor]:
    """The weights in float32, if they are complete and of the right shapes.

    Raises:
        ArtifactError: one is left over, lacking, of another shape, or no floats.
    """
    weights = dict(weights)
    expected = model.state_dict()
    for name in set(weights) - set(expected):
        ignored = model._keys_to_ignore_on_load_unexpected
        if not any(re.search(pattern, name) for pattern in ignored):
            raise ArtifactError(
                path, f" has {name[:200]!r}, which this config's model does not have."
            )
        del weights[name]
    weights.setdefault("final_logits_bias", torch.zeros(model.config.vocab_size))
    if model.config.tied_unembed and "lm_head.weight" in weights:
        weights.setdefault("transformer.wte.weight", weights["lm_head.weight"])
    for name, tensor in expected.items():
        if name not in weights:
            raise ArtifactError(path, f" lacks {name!r}, which this config's model needs.")
        weight = weights[name]
        if not isinstance(weight, torch.Tensor) or not weight.is_floating_point():
            kind = weight.dtype if isinstance(weight, torch.Tensor) else type(weight).__name__
            raise ArtifactError(path, f" has {name!r} of {kind}, expected a tensor of floats.")
        if weight.shape != tensor.shape:
            raise ArtifactError(
                path,
                f" has {name!r} of shape {tuple(weight.shape)}, but this config needs "
                f"{tuple(tensor.shape)}.",
            )
    return {name: tensor.float() for name, tensor in weights.items()}
