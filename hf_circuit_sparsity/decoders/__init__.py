"""Where each architecture keeps its residual stream, one file per architecture.

Importing this registers every architecture; [`register_residual_stream`] adds another.
"""

from .circuitgpt import CircuitGPTStream
from .gpt2 import GPT2Stream
from .llama import LlamaStream
from .residual_stream import ResidualStream, register_residual_stream, residual_stream

__all__ = [
    "CircuitGPTStream",
    "GPT2Stream",
    "LlamaStream",
    "ResidualStream",
    "register_residual_stream",
    "residual_stream",
]
