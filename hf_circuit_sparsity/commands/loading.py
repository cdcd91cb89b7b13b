"""What commands read: a saved model with its tokenizer, and text for it."""

from pathlib import Path

from datasets import Dataset
from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..circuits.circuit import Circuit
from ..modeling.modeling_circuitgpt import CircuitGPTForCausalLM
from ..tasks.corpus import build_corpus
from ..tasks.packing import pack_dataset


def load_model(model: str) -> tuple[CircuitGPTForCausalLM, PreTrainedTokenizerBase]:
    """A saved model and its tokenizer.

    Raises:
        ValueError: it is damaged, or neither a folder nor a repository with both.
    """
    try:
        loaded = CircuitGPTForCausalLM.from_pretrained(model).eval()
        return loaded, _tokenizer_beside(model)
    except SafetensorError as error:
        raise ValueError(
            f"The weights in {model} are damaged ({error}); copy or download them again."
        ) from error
    except OSError as error:
        raise ValueError(
            f"{model!r} is neither a folder with a model and its tokenizer nor the name of a "
            "repository with both; check its name."
        ) from error


def _tokenizer_beside(model: str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(model)
    except ValueError as error:
        raise ValueError(
            f"{model!r} holds a model, but no tokenizer beside it that could be read; save the "
            "tokenizer there too."
        ) from error


def reference_blocks(
    corpus: str | None, model: CircuitGPTForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> Dataset | None:
    """The Python files of a folder in blocks as long as the model's context; None for None."""
    if corpus is None:
        return None
    return pack_dataset(build_corpus(corpus)["train"], tokenizer, model.config.block_size)


def load_circuit(
    name: str, model: str | None, corpus: str | None
) -> tuple[Circuit, CircuitGPTForCausalLM, PreTrainedTokenizerBase, Dataset | None]:
    """A saved circuit, its model with the tokenizer, and the text of [`reference_blocks`]."""
    circuit = Circuit.from_pretrained(name)
    loaded, tokenizer = load_model(model or _model_of(circuit, Path(name)))
    circuit.check_model(loaded)  # before the corpus is read
    return circuit, loaded, tokenizer, reference_blocks(corpus, loaded, tokenizer)


def _model_of(circuit: Circuit, folder: Path) -> str:
    """The model of a circuit: what it says itself, or beside it as our commands lay them out."""
    beside = [folder.parent / "model", folder.parent.parent]
    for candidate in (Path(circuit.model_name or folder), *beside):
        if (candidate / "config.json").is_file():
            return str(candidate)
    if not circuit.model_name:
        raise ValueError(
            f"The circuit in {folder} does not say which model it is of; pass --model."
        )
    return circuit.model_name
