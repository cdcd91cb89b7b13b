"""Writes mechanisms into small decoders: the same calls for every architecture.

A builder starts from a model whose weights are noise and writes heads and neurons into it, through
the description of its architecture. Which channels, heads and neurons they take is drawn. Every
token has the same large entry on one channel, the ballast, so that the norms do not change much
with what a token says, and so that thresholds have something to be compared with.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Literal, NamedTuple

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from hf_circuit_sparsity.circuits.gating import norms_of
from hf_circuit_sparsity.decoders.decoder import decoder_of
from hf_circuit_sparsity.decoders.layer import Part
from hf_circuit_sparsity.modeling.configuration_circuitgpt import CircuitGPTConfig
from hf_circuit_sparsity.modeling.modeling_circuitgpt import CircuitGPTForCausalLM

Nodes = frozenset[tuple[str, int]]
"""Site and index of each."""

LENGTH = 12
"""Tokens of every prompt, and of what the models read."""
_WIDTH, _HEADS, _HEAD_DIM, _NEURONS = 32, 4, 8, 32
_BALLAST = 2.0
# What a norm makes of an entry of 1 beside the ballast, roughly.
_UNIT = 2.5
# How far the score of what a head attends to is above the rest, before scaling by its width.
_SHARPNESS = 36.0
_UNEMBEDDING = 2.0

FILLERS = tuple(f"w{i}" for i in range(16))
WORDS = (
    "<pad>", "yes", "no", "on", "off", "not", "here", "x", "y", "is", "left", "right", "tick",
    "red", "blue", "spare", *FILLERS,
)  # fmt: skip


class Match(NamedTuple):
    """A head attends to tokens whose key has the sign of the query."""

    query: int | None
    """Channel of the last token that is compared; None for a constant 1."""
    key: int
    """Channel of the tokens it is compared with."""


Look = Literal["everywhere", "previous"] | Match


def word_tokenizer(words: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per word; the first pads and stands for unknown ones."""
    vocabulary = {word: i for i, word in enumerate(words)}
    first = next(iter(vocabulary))
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token=first))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token=first)


def _circuitgpt(n_layers: int) -> PreTrainedModel:
    return CircuitGPTForCausalLM(
        CircuitGPTConfig(
            n_layer=n_layers, n_head=_HEADS, d_head=_HEAD_DIM, d_model=_WIDTH, d_mlp=_NEURONS,
            block_size=LENGTH, vocab_size=len(WORDS), afrac=None, sink=False,
            enable_bigram_table=False, activation_type="relu",
        )
    )  # fmt: skip


def _llama(n_layers: int) -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(
            num_hidden_layers=n_layers, num_attention_heads=_HEADS, num_key_value_heads=_HEADS,
            head_dim=_HEAD_DIM, hidden_size=_WIDTH, intermediate_size=_NEURONS,
            max_position_embeddings=LENGTH, vocab_size=len(WORDS), hidden_act="relu",
            attention_bias=True, mlp_bias=True, tie_word_embeddings=False, pad_token_id=0,
            bos_token_id=None, eos_token_id=None,
            rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        )
    )  # fmt: skip


ARCHITECTURES: dict[str, Callable[[int], PreTrainedModel]] = {
    "circuitgpt": _circuitgpt,
    "llama": _llama,
}


class Builder:
    """A model to be written into.

    Args:
        architecture: a key of `ARCHITECTURES`.
        noise: standard deviation of all weights that are not written.
        seed: of the noise, and of where mechanisms are put.
        n_layers: of the model.
    """

    @torch.no_grad()
    def __init__(self, architecture: str, noise: float, seed: int, n_layers: int = 2):
        self._generator = torch.Generator().manual_seed(seed)
        self.model = ARCHITECTURES[architecture](n_layers).eval()
        norms = {p for norm in norms_of(self.model) for p in norm.parameters()}
        for p in self.model.parameters():
            if p not in norms:
                p.copy_(noise * torch.randn(p.shape, generator=self._generator))
        decoder = decoder_of(self.model)
        self._layers, self._position_table = decoder.layers, decoder.positions
        self._channels = self._shuffled(_WIDTH)
        self._heads = [self._shuffled(_HEADS) for _ in range(n_layers)]
        self._neurons = [self._shuffled(_NEURONS) for _ in range(n_layers)]
        self._position_channels: list[int] = []
        (self._ballast,) = self.channels(1)
        self.model.get_input_embeddings().weight[:, self._ballast] = _BALLAST

    def _shuffled(self, count: int) -> list[int]:
        return torch.randperm(count, generator=self._generator).tolist()

    def channels(self, count: int) -> list[int]:
        """Channels of the residual stream that nothing is written to yet."""
        return [self._channels.pop() for _ in range(count)]

    @torch.no_grad()
    def embed(self, channel: int, values: Mapping[str, float]) -> None:
        """Let words have these entries on a channel."""
        for word, value in values.items():
            self.model.get_input_embeddings().weight[WORDS.index(word), channel] = value

    @torch.no_grad()
    def answer(self, channel: int, threshold: float = 0.0) -> None:
        """Let "yes" be the answer where the last stream is above a threshold, else "no"."""
        weight = self.model.get_output_embeddings().weight
        for word, sign in (("yes", 1), ("no", -1)):
            weight[WORDS.index(word), channel] = sign * _UNEMBEDDING
            weight[WORDS.index(word), self._ballast] = -sign * _UNEMBEDDING * threshold / _BALLAST

    @torch.no_grad()
    def head(
        self, layer: int, read: int, write: int, size: float = 2.0, look: Look = "everywhere"
    ) -> Nodes:
        """Write a head that carries one channel to another.

        Args:
            layer: of the model.
            read: channel of the tokens attended to.
            write: channel that the head adds to.
            size: what it adds, roughly, for one token with an entry of 1; of all the others only
                those of the prompt may have one.
            look: what it attends to: all tokens alike, the previous one, or a match.

        Returns:
            The nodes it consists of.
        """
        name, parts = f"h.{layer}.attn", self._layers[layer]
        first = self._heads[layer].pop() * _HEAD_DIM
        value = first + self._shuffled(_HEAD_DIM)[0]
        gain = size / _UNIT * (LENGTH if look == "everywhere" else 1)
        # All of the gain comes first: what noise adds to the value must not be made larger.
        _connect(parts.value, value, {read: gain})
        parts.attn_out.weight[write, value] = 1.0
        nodes = {(f"{name}.act_in", read), (f"{name}.v", value), (f"{name}.resid_delta", write)}
        if look == "previous":
            nodes |= self._look_back(layer, first)
        elif isinstance(look, Match):
            # The slowest of rotary positions: it hardly turns within a prompt.
            node = first + _HEAD_DIM // 2 - 1
            weight = math.sqrt(_SHARPNESS) / _UNIT
            for side, part, channel in (("q", parts.query, look.query), ("k", parts.key, look.key)):
                if channel is None:
                    _connect(part, node, {}, bias=math.sqrt(_SHARPNESS))
                else:
                    _connect(part, node, {channel: weight})
                    nodes |= {(f"{name}.act_in", channel), (f"{name}.{side}", node)}
        return frozenset(nodes)

    def _look_back(self, layer: int, first: int) -> Nodes:
        """Let a head attend to the previous token; nodes that are constant are none of it."""
        name, parts = f"h.{layer}.attn", self._layers[layer]
        half = _HEAD_DIM // 2
        if self._position_table is None:
            # Rotary: query and key of two frequencies are constants, a turn of one token apart.
            length = math.sqrt(2 * _SHARPNESS)
            for i in (0, 1):
                turn = 1000.0 ** (-i / half)
                _connect(parts.query, first + i, {}, bias=length)
                _connect(parts.key, first + i, {}, bias=length * math.cos(turn))
                _connect(parts.key, first + half + i, {}, bias=length * math.sin(turn))
            return frozenset()
        # A table: cosine and sine of the position, in the key's case of the next one.
        turn = 2 * math.pi / LENGTH
        if not self._position_channels:
            self._position_channels = self.channels(2)
            angles = turn * torch.arange(LENGTH)
            for channel, values in zip(
                self._position_channels, (angles.cos(), angles.sin()), strict=True
            ):
                self._position_table[:, channel] = 1.5 * values
        cosine, sine = self._position_channels
        c, s = math.cos(turn), math.sin(turn)
        length = math.sqrt(12 * _SHARPNESS) / (1.5 * _UNIT)
        rows = (first, {cosine: 1, sine: 0}, {cosine: c, sine: -s}), (
            first + half, {cosine: 0, sine: 1}, {cosine: s, sine: c},
        )  # fmt: skip
        nodes = {(f"{name}.act_in", channel) for channel in (cosine, sine)}
        for node, query, key in rows:
            _connect(parts.query, node, {ch: length * w for ch, w in query.items()})
            _connect(parts.key, node, {ch: length * w for ch, w in key.items()})
            nodes |= {(f"{name}.q", node), (f"{name}.k", node)}
        return frozenset(nodes)

    @torch.no_grad()
    def neuron(
        self, layer: int, reads: Mapping[int, float], bias: float, write: int, gain: float
    ) -> Nodes:
        """Write a neuron that adds `gain * relu(reads @ stream + bias)` to a channel.

        What it reads comes from a norm. In a gated MLP that is the gate, and the rest is 1.

        Returns:
            The nodes it consists of.
        """
        name, parts = f"h.{layer}.mlp", self._layers[layer]
        node = self._neurons[layer].pop()
        _connect(parts.gate or parts.up, node, reads, bias)
        if parts.gate is not None:
            _connect(parts.up, node, {}, 1.0)
        parts.down.weight[write, node] = gain
        read = {(f"{name}.act_in", channel) for channel in reads}
        return frozenset(read | {(f"{name}.post_act", node), (f"{name}.resid_delta", write)})


def _connect(part: Part, node: int, reads: Mapping[int, float], bias: float = 0.0) -> None:
    row = node if part.rows is None else int(part.rows[node])
    for channel, weight in reads.items():
        part.module.weight[row, channel] = weight
    part.module.bias[row] += bias
