"""Reads the Hub layout of the public reproduction: `config.json` with `model_config`, and
`pytorch_model.bin`.

Its models are CircuitGPTs with other names of fields and weights.
"""

import os
import re
from typing import Any

import torch
from transformers import PreTrainedModel

from .configuration_circuitgpt import PAPER_ACTIVATION_SITES
from .openai_checkpoint import checked_weights, read_pickle

# Theirs → ours.
_FIELDS = {
    "n_layer": "n_layer", "d_model": "d_model", "n_ctx": "block_size", "d_head": "d_head",
    "d_mlp": "d_mlp", "vocab_size": "vocab_size", "use_rms_norm": "rms_norm", "use_bias": "bias",
    "tie_embeddings": "tied_unembed", "use_positional_embeddings": "use_positional_embeddings",
    "use_bigram_table": "enable_bigram_table", "use_attention_sinks": "sink",
    "activation": "activation_type", "dropout": "dropout",
}  # fmt: skip
# What their code assumes where a file does not say, if that is not what ours assumes.
_DEFAULTS = {"d_model": 1024, "use_positional_embeddings": False}
_UNUSED = ("use_flash_attention",)  # how it is computed, not what
# Their stream "resid_pre" is also cut before the first block, where ours is not.
_SITES = {"resid_mid": "resid_post_attn"}
_NAMES = {
    r"^blocks\.": "transformer.h.",
    r"^(wte|wpe|ln_f)\.": r"transformer.\1.",
    r"\.attn_fn\.sink_logit$": ".attn_imp.sink_logit",
}


def config_fields(content: dict[str, Any]) -> dict[str, Any]:
    """The fields of our config that say the same as theirs, and what else is in the file.

    Raises:
        ValueError: a section is not what it must be, or a field of `model_config` is not known.
    """
    content = dict(content)
    model, sparsity = content.pop("model_config"), content.get("sparsity_config", {})
    for name, section in (("model_config", model), ("sparsity_config", sparsity)):
        if not isinstance(section, dict):
            raise ValueError(f"{name} is {section!r:.200}, expected an object")
    fields = {name: value for name, value in model.items() if name not in _UNUSED}
    if unknown := sorted(set(fields) - set(_FIELDS)):
        raise ValueError(f"model_config has {', '.join(unknown):.200}, which is not known here")
    fields = {_FIELDS[name]: value for name, value in {**_DEFAULTS, **fields}.items()}
    fields["afrac"] = None
    if sparsity.get("enable_activation_sparsity", True):
        fields["afrac"] = sparsity.get("activation_topk_fraction", 0.25)
        sites = str(sparsity.get("activation_sparsity_locations", PAPER_ACTIVATION_SITES))
        fields["afrac_loctypes"] = [_SITES.get(s.strip(), s.strip()) for s in sites.split(",")]
    # Said here, or transformers would open the weights to see.
    return {**content, "model_type": "circuitgpt", "dtype": "float32", **fields}


def read_weights(path: str | os.PathLike, model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The weights of a `pytorch_model.bin`, by our names. Nothing in the file is executed.

    Raises:
        ArtifactError: the file is damaged or holds more than tensors, or a weight is left over,
            lacking or of another shape.
    """
    weights = {}
    for name, tensor in read_pickle(path).items():
        for theirs, ours in _NAMES.items():
            name = re.sub(theirs, ours, name)
        weights[name] = tensor
    return checked_weights(model, weights, path)
