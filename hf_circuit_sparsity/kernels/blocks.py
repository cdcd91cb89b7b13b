"""Tokens through all blocks of a CircuitGPT: one in a single call, many in a few; see decode.c and
blocks.c."""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .attention import AttentionKernels
from .calling import LANES, Shared, declare, float_bits, pieces

_CHUNK = 2 * LANES  # as in blocks.c, where it is largest
_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_int64


def _fields(kind: type, names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


class Linear(ctypes.Structure):
    """`struct linear` of blocks.h."""

    _fields_ = [
        *_fields(_POINTER, "row_starts columns starts rows_of place values bias"),
        *_fields(_SIZE, "rows width"),
    ]


class Block(ctypes.Structure):
    """`struct block` of blocks.h."""

    _fields_ = [
        *_fields(Linear, "attention_in attention_out mlp_in mlp_out"),
        *_fields(_POINTER, "norm_1 norm_2 position_norm_1 position_norm_2 sink keys values"),
        *_fields(_SIZE, "k_read k_query k_key k_value k_attended k_after_attention"),
        *_fields(_SIZE, "k_mlp_read k_neuron k_mlp k_after_mlp"),
    ]


class _Sizes(ctypes.Structure):
    _fields_ = _fields(
        _SIZE,
        "sequences width position_width heads head_width neurons past room relu relu_residual",
    )


@dataclass
class BlockShape:
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

    def with_cache(self, sequences: int, past: int, room: int) -> _Sizes:
        """As `struct sizes` of blocks.h."""
        return _Sizes(
            sequences, self.width, self.position_width, self.heads, self.head_width, self.neurons,
            past, room, self.relu, self.relu_residual,
        )  # fmt: skip


class BlockKernels(AttentionKernels):
    """The kernels of decode.c and blocks.c."""

    def __init__(self, library: ctypes.CDLL):
        super().__init__(library)
        self._decode = declare(library.decode, "pipddpppp")
        self._between_attentions = Shared(library, "between_attentions")

    def all_tokens(
        self,
        blocks: "ctypes.Array[Block]",
        shape: BlockShape,
        sinks: Sequence[Tensor],
        x: Tensor,
        positions: Tensor | None,
        keep: Callable[[Tensor, Tensor, int], object] | None,
    ) -> Tensor:
        """The stream after all blocks.

        Args:
            blocks: of which keys, values and sinks are not read.
            shape: of the blocks.
            sinks: of every block, `(heads,)`.
            x: `(B, T, width)`, T at least 2; every token sees itself and those before it.
            positions: `(B * T, position_width)`, contiguous, if there are any.
            keep: called with the keys and values of every block, `(B, H, T, head_width)`, and its
                index; what it does not copy keeps the block's queries in memory as well.
        """
        s, (batch, tokens, _) = shape, x.shape
        sizes = s.with_cache(0, 0, 0)
        inner, read = s.heads * s.head_width, s.width + s.position_width
        own = _CHUNK * (2 * read + s.neurons + max(s.neurons, read, inner) + LANES)
        parts = pieces(batch * tokens, _CHUNK)
        scratch = torch.empty(len(parts), own)
        stream = torch.empty(x.shape).copy_(x)

        def go_on(done: int | None, attended: Tensor | None, qkv: Tensor | None) -> None:
            next_ = 0 if done is None else done + 1
            at, size = ctypes.addressof(blocks), ctypes.sizeof(Block)
            self._between_attentions([
                (
                    0 if done is None else at + done * size,
                    0 if qkv is None else at + next_ * size, ctypes.addressof(sizes),
                    float_bits(s.eps), 0 if positions is None else positions.data_ptr(),
                    0 if attended is None else attended.data_ptr(), part.start, part.stop,
                    stream.data_ptr(), 0 if qkv is None else qkv.data_ptr(), own.data_ptr(),
                )
                for part, own in zip(parts, scratch, strict=True)
            ])  # fmt: skip

        read_next = torch.empty(batch, tokens, 3, s.heads, s.head_width)
        go_on(None, None, read_next)
        for i, sink in enumerate(sinks):
            query, key, value = (part.transpose(1, 2) for part in read_next.unbind(2))
            if keep is not None:
                keep(key, value, i)
            attended = self.attend(query, key, value, sink, s.scale)[0].transpose(1, 2)
            read_next = torch.empty_like(read_next) if i + 1 < len(sinks) else None
            go_on(i, attended, read_next)
        return stream

    def decode(
        self,
        blocks: "ctypes.Array[Block]",
        shape: BlockShape,
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
        sizes = s.with_cache(len(x), past, room)
        floats = 2 * (s.width + s.position_width) + 4 * s.heads * s.head_width + s.neurons
        scratch = torch.empty(floats + room + LANES)
        out = torch.empty(x.shape).copy_(x)
        self._decode(
            ctypes.addressof(blocks), len(blocks), ctypes.addressof(sizes), s.eps, s.scale,
            out.data_ptr(), None if positions is None else positions.data_ptr(),
            None if seen is None else seen.data_ptr(), scratch.data_ptr(),
        )  # fmt: skip
        return out
