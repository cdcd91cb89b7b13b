"""A small sparse model and a circuit of it, to look at before anything is trained."""

from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..circuits.circuit import Circuit
from ..modeling.modeling_circuitgpt import CircuitGPTForCausalLM

_FILES = Path(__file__).parent


class Example(NamedTuple):
    """What [`load_example`] returns.

    Attributes:
        model: two layers, d_model 128, 5 % of its weights nonzero; in evaluation, float32.
        tokenizer: its 1,024 tokens.
        circuit: how it closes a string with the quote that opened it, with its measurements.
    """

    model: CircuitGPTForCausalLM
    tokenizer: PreTrainedTokenizerBase
    circuit: Circuit


def load_example() -> Example:
    """Load the model and the circuit that come with the package; nothing is downloaded.

    The model was trained on the Python standard library for a few minutes, much as `quickstart`
    trains one, so it knows little else than `load_task("single_double_quote", tokenizer)`.
    `benchmarks/example_model.py` made it; `circuit.verification` says which checks the circuit
    passes, and which not.
    """
    folder = _FILES / "model"
    model = CircuitGPTForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return Example(model, tokenizer, Circuit.from_pretrained(_FILES / "circuit"))
