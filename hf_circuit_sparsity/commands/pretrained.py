"""A model that others have trained, for `train` to make sparse: from a folder, the Hub, or GGUF."""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import is_gguf_available

from ..modeling.causal_lm import load_causal_lm
from .loading import model_at, read_tokenizer, tokenizer_at

_GGUF = ".gguf"


def load_pretrained(
    name: str, tokenizer: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model that predicts the next token, in float32, and its tokenizer.

    Args:
        name: a folder or Hub id as `from_pretrained` takes them, the output folder of a run, or a
            GGUF file: its path, or `user/name/file.gguf` on the Hub. What GGUF has quantized is
            unpacked.
        tokenizer: folder or Hub id of another tokenizer than the one beside the model.

    Raises:
        ValueError: nothing is there, it is no such model, it is damaged, it has no tokenizer or
            one with more tokens than the model, or the package `gguf` is missing.
    """
    is_gguf = name.endswith(_GGUF)
    source, options = _gguf(name) if is_gguf else (model_at(name), {})
    try:
        load = AutoModelForCausalLM.from_pretrained if is_gguf else load_causal_lm
        model = load(source, dtype=torch.float32, **_unpacked(options))
    except SafetensorError as error:
        raise ValueError(
            f"The weights in {name} are damaged ({error}); copy or download them again."
        ) from error
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{name!r} could not be loaded as a model that predicts the next token: {error}"
        ) from error
    try:
        if tokenizer is None:
            tokens = read_tokenizer(source, **options)
        else:
            tokens = read_tokenizer(tokenizer_at(tokenizer))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{tokenizer or name!r} holds no tokenizer that could be read ({error}); pass one with "
            "--tokenizer."
        ) from error
    entries = model.get_input_embeddings().num_embeddings
    if len(tokens) > entries:
        raise ValueError(
            f"The tokenizer has {len(tokens):,} tokens, the model in {name} embeds {entries:,}; "
            "pass the model's own with --tokenizer."
        )
    return model, tokens


def _gguf(name: str) -> tuple[str, dict[str, Any]]:
    """What `from_pretrained` takes for a GGUF file: where it is, and its name there."""
    if not is_gguf_available():
        raise ValueError(
            f"{name} is a GGUF file, and the package that reads them is not installed: run "
            "`pip install 'hf-circuit-sparsity[gguf]'`."
        )
    path = Path(name).expanduser()
    if path.is_file():
        return str(path.parent), {"gguf_file": path.name}
    repo, _, file = name.rpartition("/")
    if path.is_absolute() or repo.count("/") != 1:
        raise ValueError(
            f"There is no file {name!r}; pass its path, or user/name/file.gguf on the Hub."
        )
    return str(Path(hf_hub_download(repo, file)).parent), {"gguf_file": file}


def _unpacked(options: dict[str, Any]) -> dict[str, Any]:
    """`options` so that quantized weights become ordinary ones, which can be trained and saved."""
    try:
        from transformers import GgufConfig
    except ImportError:  # transformers before 5.20 knows no other way
        return options
    return {**options, "quantization_config": GgufConfig(dequantize=True)} if options else options
