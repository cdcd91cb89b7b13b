"""Where each architecture keeps its residual stream."""

from .residual_stream import ResidualStream, register_residual_stream, residual_stream

__all__ = [
    "ResidualStream",
    "register_residual_stream",
    "residual_stream",
]
