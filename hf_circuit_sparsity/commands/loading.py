"""What commands read: a saved model with its tokenizer, circuits of it, and text for it."""

import warnings
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HFValidationError, RemoteEntryNotFoundError
from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..circuits.circuit import Circuit
from ..decoders.decoder import check_registered
from ..modeling.causal_lm import load_causal_lm, model_type_of
from ..modeling.configuration_circuitgpt import CircuitGPTConfig
from ..tasks.corpus import build_corpus
from ..tasks.packing import pack_dataset
from .console import say


def model_at(name: str) -> str:
    """Where a model is: in a folder, in that of a run, or on the Hub; see [`_locate`]."""
    return _locate(name, "model", "config.json", ("model",))


def tokenizer_at(name: str) -> str:
    """Where a tokenizer is, likewise."""
    return _locate(name, "tokenizer", "tokenizer_config.json", ("model", "tokenizer"))


def circuit_at(name: str) -> str:
    """Where a circuit is, likewise; a run with several does not say which.

    Raises:
        ValueError: it is nowhere, or there are several.
    """
    inside = sorted(path.parent.name for path in Path(name).glob("circuits/*/circuit.json"))
    if len(inside) > 1 and not (Path(name) / "circuit.json").is_file():
        raise ValueError(
            f"{name} is a run with the circuits {', '.join(inside)}; pass the folder of one, as "
            f"{Path(name) / 'circuits' / inside[0]}."
        )
    return _locate(name, "circuit", "circuit.json", ("circuit", *(f"circuits/{n}" for n in inside)))


def _locate(name: str, what: str, file: str, inside: Sequence[str]) -> str:
    """The folder or Hub id that an argument of a command means.

    Only what can be no folder here is asked for on the Hub, and once.

    Args:
        name: a folder, the output folder of a command, or `user/name`.
        what: that is looked for.
        file: that shows that it is there.
        inside: where it may be within the output folder of a command.

    Raises:
        ValueError: it is in neither.
    """
    folder = Path(name).expanduser()
    for path in (folder, *(folder / part for part in inside)):
        if (path / file).is_file():
            return str(path)
    if folder.exists():
        raise ValueError(f"{name} holds no {what}: there is no {file} in it, nor in {inside[0]}/.")
    if folder.parents[-2:-1] and folder.parents[-2].exists():
        beside = folder.parent.iterdir() if folder.parent.is_dir() else ()
        close = get_close_matches(folder.name, [path.name for path in beside], 1)
        meant = f"did you mean {str(folder.parent / close[0])!r}?" if close else "check its name."
        raise ValueError(f"There is no folder {name!r} to take a {what} from; {meant}")
    try:
        hf_hub_download(name, file)
    except RemoteEntryNotFoundError:
        return name  # something is there; what reads it knows more of what it may be
    except (HFValidationError, OSError) as error:
        raise ValueError(
            f"{name!r} is neither a folder with a {what} nor the name of a repository with one; "
            "check its name."
        ) from error
    return name


def read_corpus(folder: str | None) -> DatasetDict:
    """[`build_corpus`], but says which files are not UTF-8 and leaves them out."""
    with warnings.catch_warnings(record=True) as caught:
        corpus = build_corpus(folder, on_bad_encoding="skip")
    for warning in caught:
        say(f"  {warning.message}")
    return corpus


def load_model(
    model: str, dtype: torch.dtype | str = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A saved model, by any name that [`model_at`] knows, and its tokenizer.

    Args:
        model: of any architecture that has a [`Decoder`]; dense, or by its nonzeros.
        dtype: to load it in, "auto" for that of the file; a CircuitGPT keeps the file's.

    Raises:
        ValueError: it is damaged, of an unknown architecture, or neither a folder nor a repository
            with both.
    """
    model = model_at(model)
    try:
        kind = model_type_of(model)
        check_registered(kind, f"The model in {model}")
        options = {} if kind == CircuitGPTConfig.model_type else {"dtype": dtype}
        loaded = load_causal_lm(model, **options).eval()
        return loaded, _tokenizer_of(model, loaded.config)
    except SafetensorError as error:
        raise ValueError(
            f"The weights in {model} are damaged ({error}); copy or download them again."
        ) from error
    except OSError as error:
        raise ValueError(
            f"{model!r} is neither a folder with a model and its tokenizer nor the name of a "
            "repository with both; check its name."
        ) from error


def read_tokenizer(name: str, **options: Any) -> PreTrainedTokenizerBase:
    """That of `AutoTokenizer`, but only where there is one.

    Beside a model of an architecture that it knows transformers makes one up, of special tokens
    alone, to which every text is the same.

    Raises:
        ValueError, OSError: there is none that could be read.
    """
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **options)
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise ValueError(f"there is no tokenizer in {name}")
    return tokenizer


def _tokenizer_of(model: str, config: PreTrainedConfig) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model, else the one that its config says it was trained with.

    The public reproduction's checkpoints have none beside them, but say so.
    """
    training = getattr(config, "training_config", None)
    named = training.get("tokenizer_name") if isinstance(training, dict) else None
    problem: Exception | None = None
    for name in (model, named) if named and isinstance(named, str) else (model,):
        try:
            tokenizer = read_tokenizer(name)
        except (ValueError, OSError) as error:
            problem = problem or error
            continue
        if name is named:
            say(f"The tokenizer is {named}, which the model's config names.")
        return tokenizer
    raise ValueError(
        f"{model!r} holds a model, but no tokenizer beside it that could be read; save the "
        "tokenizer there too."
    ) from problem


def reference_blocks(
    corpus: str | None, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Dataset | None:
    """The Python files of a folder in blocks that the model can read; None for None."""
    if corpus is None:
        return None
    length = min(256, model.config.max_position_embeddings)
    return pack_dataset(read_corpus(corpus)["train"], tokenizer, length)


def load_circuit(
    name: str, model: str | None, corpus: str | None
) -> tuple[Circuit, PreTrainedModel, PreTrainedTokenizerBase, Dataset | None]:
    """A saved circuit, its model with the tokenizer, and the text of [`reference_blocks`]."""
    circuit = Circuit.from_pretrained(name)
    loaded, tokenizer = load_model(model or _model_of(circuit, Path(name)))
    circuit.check_model(loaded)  # before the corpus is read
    return circuit, loaded, tokenizer, reference_blocks(corpus, loaded, tokenizer)


def _model_of(circuit: Circuit, folder: Path) -> str:
    """The model of a circuit: what it says itself, or beside it as our commands lay them out."""
    beside = [folder.parent / "model", folder.parent.parent, folder.parent.parent / "model"]
    for candidate in (Path(circuit.model_name or folder), *beside):
        if (candidate / "config.json").is_file():
            return str(candidate)
    if not circuit.model_name:
        raise ValueError(
            f"The circuit in {folder} does not say which model it is of; pass --model."
        )
    return circuit.model_name
