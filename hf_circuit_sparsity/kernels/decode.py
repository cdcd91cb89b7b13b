"""One token through all blocks of a CircuitGPT, in one call; see decode.c."""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from .calling import LANES, Library, declare

_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_int64


def _fields(kind: type, names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


class LinearByColumns(ctypes.Structure):
    """`struct linear` of decode.c."""

    _fields_ = _fields(_POINTER, "starts rows_of place values bias") + _fields(_SIZE, "rows width")


class DecodedBlock(ctypes.Structure):
    """`struct block` of decode.c."""

    _fields_ = [
        *_fields(LinearByColumns, "attention_in attention_out mlp_in mlp_out"),
        *_fields(_POINTER, "norm_1 norm_2 position_norm_1 position_norm_2 sink keys values"),
        *_fields(_SIZE, "k_read k_query k_key k_value k_attended k_after_attention"),
        *_fields(_SIZE, "k_mlp_read k_neuron k_mlp k_after_mlp"),
    ]


@dataclass
class DecodedShape:
    """What is the same in all blocks.

    Attributes:
        width: of the residual stream.
        position_width: of positions that are concatenated to it, or 0.
        heads, head_width: of the attention; a head's width is one of `ATTENTION_WIDTHS`.
        neurons: of an MLP.
        relu: whether neurons are ReLUs, else GELUs.
        relu_residual: whether the stream goes through a ReLU after each addition.
        eps: of the norms.
        scale: of the attention's scores.
    """

    width: int
    position_width: int
    heads: int
    head_width: int
    neurons: int
    relu: bool
    relu_residual: bool
    eps: float
    scale: float


class _Sizes(ctypes.Structure):
    _fields_ = _fields(
        _SIZE,
        "sequences width position_width heads head_width neurons past room relu relu_residual",
    )


class DecodeKernels(Library):
    """The kernel of decode.c."""

    def __init__(self, library: ctypes.CDLL):
        super().__init__(library)
        self._decode = declare(library.decode, "pipddpppp")

    def decode(
        self,
        blocks: "ctypes.Array[DecodedBlock]",
        shape: DecodedShape,
        x: Tensor,
        positions: Tensor | None,
        seen: Tensor | None,
        past: int,
        room: int,
    ) -> Tensor:
        """The stream after all blocks.

        Args:
            blocks: with their keys and values, `(B, heads, room, head_width)`, of which the new
                token's are written behind the `past` ones.
            shape: of the blocks.
            x: `(B, width)`.
            positions: `(B, position_width)`, contiguous, if there are any.
            seen: `(B, past + 1)` bool, contiguous; None where all is seen.
            past: tokens before.
            room: more than `past`.
        """
        s = shape
        sizes = _Sizes(
            len(x), s.width, s.position_width, s.heads, s.head_width, s.neurons, past, room,
            s.relu, s.relu_residual,
        )  # fmt: skip
        floats = 2 * (s.width + s.position_width) + 4 * s.heads * s.head_width + s.neurons
        scratch = torch.empty(floats + room + LANES)
        out = torch.empty(x.shape).copy_(x)
        self._decode(
            ctypes.addressof(blocks), len(blocks), ctypes.addressof(sizes), s.eps, s.scale,
            out.data_ptr(), None if positions is None else positions.data_ptr(),
            None if seen is None else seen.data_ptr(), scratch.data_ptr(),
        )  # fmt: skip
        return out
