"""Where each architecture keeps its nodes, weights and residual stream, one file per architecture.

Importing this registers every architecture; [`register_decoder`] adds another.
"""

from .circuitgpt import CircuitGPTDecoder
from .decoder import Decoder, decoder_of, register_decoder
from .gpt2 import GPT2Decoder
from .gpt_neox import GPTNeoXDecoder
from .layer import Layer, Part, Projection, Target
from .llama import GemmaDecoder, LlamaDecoder
from .sites import Site

__all__ = [
    "CircuitGPTDecoder",
    "Decoder",
    "GPT2Decoder",
    "GPTNeoXDecoder",
    "GemmaDecoder",
    "Layer",
    "LlamaDecoder",
    "Part",
    "Projection",
    "Site",
    "Target",
    "decoder_of",
    "register_decoder",
]
