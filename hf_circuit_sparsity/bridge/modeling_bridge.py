"""A sparse model beside a frozen dense one, and the bridges between them (Gao et al. 2025).

The dense model is anybody's; the sparse one is a [`CircuitGPTForCausalLM`] of the same depth whose
circuits can be read. At every residual location (see `decoders/decoder.py`) an encoder,
linear with AbsTopK behind it, maps the dense stream to the sparse one, and a linear decoder back.

Shapes in comments: B batch, T tokens, V vocabulary, 2L + 1 locations.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..decoders.decoder import Decoder, decoder_of
from ..decoders.hooks import temporary_hooks
from ..modeling.configuration_circuitgpt import CircuitGPTConfig
from ..modeling.fingerprint import model_fingerprint
from ..modeling.modeling_circuitgpt import CircuitGPTForCausalLM
from .bridge_layer import Bridge
from .checkpoint import BridgePreTrainedModel, load_dense
from .configuration_bridge import BridgeConfig
from .intervention import check_location, steering_point
from .losses import LOSS_TERMS, BridgeOutput, mean_kl, normalized_mse


class BridgedCausalLM(BridgePreTrainedModel):
    """A frozen dense model, a sparse model and the bridges between them.

    Make one with [`from_models`], train it with [`BridgeTrainer`], save it with `save_pretrained`
    (without the dense weights) and load it with `from_pretrained`. [`steer`] tries on the dense
    model what was found in the sparse one.

    Attributes:
        dense, sparse: ordinary models.
        bridges: one [`Bridge`] per location.
    """

    accepts_loss_kwargs = False

    def __init__(self, config: BridgeConfig, dense: PreTrainedModel):
        super().__init__(config)
        sparse = config.sparse_config
        check_pair(dense, sparse)
        self.dense = dense.requires_grad_(False).eval()
        self.sparse = CircuitGPTForCausalLM(sparse)
        k = None if config.encoder_afrac is None else int(config.encoder_afrac * sparse.d_model)
        if k is not None and k < 1:
            raise ValueError(
                f"encoder_afrac={config.encoder_afrac} keeps none of the {sparse.d_model} channels "
                "of the sparse model; use a larger fraction or a wider sparse model."
            )
        self.bridges = nn.ModuleList(
            Bridge(dense.config.hidden_size, sparse.d_model, k, config.bridge_bias)
            for _ in range(2 * sparse.n_layer + 1)
        )
        self.post_init()

    def init_weights(self) -> None:
        """Nothing: the parts come initialized, the dense model trained."""

    @classmethod
    def from_models(
        cls,
        dense: PreTrainedModel | str | os.PathLike,
        sparse: CircuitGPTForCausalLM | CircuitGPTConfig | None = None,
        *,
        encoder_afrac: float | None = 0.25,
        bridge_bias: bool = True,
    ) -> "BridgedCausalLM":
        """Fresh bridges between a dense model and a sparse one.

        Args:
            dense: a causal language model of any architecture with a [`Decoder`] and without
                parallel layers, or the folder or Hub id of one. It is frozen.
            sparse: the sparse model, or the config of a fresh one; [`default_sparse_config`] if
                `None`.
            encoder_afrac, bridge_bias: see [`BridgeConfig`].

        Raises:
            ValueError: an unknown architecture, parallel layers, a sparse model that is no
                CircuitGPT, or depths or vocabularies that differ.
        """
        if isinstance(dense, (str, os.PathLike)):
            dense = load_dense(dense)
        sparse = default_sparse_config(dense) if sparse is None else sparse
        is_model = isinstance(sparse, CircuitGPTForCausalLM)
        if not is_model and not isinstance(sparse, CircuitGPTConfig):
            raise ValueError(
                f"sparse is a {type(sparse).__name__}, but the sparse model beside a dense one is "
                "a CircuitGPT; pass one, or leave it out for a fresh one."
            )
        config = BridgeConfig(
            sparse_config=(sparse.config if is_model else sparse).to_dict(),
            base_model_name_or_path=str(dense.config.name_or_path or ""),
            base_model_fingerprint=model_fingerprint(dense),
            base_model_type=dense.config.model_type,
            base_width=dense.config.hidden_size,
            encoder_afrac=encoder_afrac,
            bridge_bias=bridge_bias,
        )
        bridged = cls(config, dense)
        if is_model:
            bridged.sparse.load_state_dict(sparse.state_dict())
        return bridged

    def get_input_embeddings(self) -> nn.Module:
        return self.sparse.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.sparse.get_output_embeddings()

    def train(self, mode: bool = True) -> "BridgedCausalLM":
        """Set the mode of the sparse model and the bridges; the dense model stays in evaluation."""
        super().train(mode)
        self.dense.eval()
        return self

    @property
    def dense_stream(self) -> Decoder:
        """The dense model's residual stream."""
        return decoder_of(self.dense)

    @property
    def sparse_stream(self) -> Decoder:
        """The sparse model's residual stream."""
        return decoder_of(self.sparse)

    @property
    def n_locations(self) -> int:
        """2L + 1."""
        return len(self.bridges)

    def encode(self, x: torch.Tensor, location: int) -> torch.Tensor:
        """Dense residual stream `(..., dense width)` to sparse, `(..., d_model)`."""
        return self.bridges[check_location(self.sparse, location)].encode(x)

    def decode(self, x: torch.Tensor, location: int) -> torch.Tensor:
        """Sparse residual stream `(..., d_model)` to dense, `(..., dense width)`."""
        bridge = self.bridges[check_location(self.sparse, location)]
        return bridge.decode(x).to(self.dense.dtype)

    def hybrid(
        self,
        input_ids: torch.LongTensor,
        enter: int | None = None,
        leave: int | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits `(B, T, V)` of a run through the sparse model from `enter` to `leave`.

        Args:
            input_ids: `(B, T)`.
            enter: location at which the run goes from the dense to the sparse model; it starts in
                the sparse model if `None`.
            leave: location at which it goes back to the dense model; it ends in the sparse model if
                `None`.
            attention_mask: `(B, T)`, 0 for padding.

        Raises:
            ValueError: neither is given, there is no such location, or `leave` is before `enter`.
        """
        if enter is None and leave is None:
            raise ValueError(
                "hybrid was called without enter and leave, so the run would never switch; give "
                "one, or call .sparse."
            )
        start = 0 if enter is None else check_location(self.sparse, enter)
        if leave is not None and check_location(self.sparse, leave) < start:
            raise ValueError(f"leave={leave} is before enter={enter}; leave at it or later.")
        dense, sparse = self.dense_stream, self.sparse_stream
        dense_x, dense_context = dense.embed(input_ids, attention_mask)
        x, sparse_context = sparse.embed(input_ids, attention_mask)
        if enter is not None:
            x = self.encode(dense.run(dense_x, dense_context, 0, enter)[-1], enter)
        x = sparse.run(x, sparse_context, start, leave)[-1]
        if leave is None:
            return sparse.logits(x, sparse_context)
        x = dense.run(self.decode(x, leave), dense_context, leave)[-1]
        return dense.logits(x, dense_context)

    def forward(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        enter_at: Sequence[int] = (),
        leave_at: Sequence[int] = (),
        loss_weights: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> BridgeOutput:
        """Run both models and measure how far apart they are.

        Args:
            input_ids: `(B, T)`.
            attention_mask: `(B, T)`, 0 for padding, which counts in no term.
            labels: `(B, T)`, as for every causal language model; without them there is no `lm`
                term and no `loss`.
            enter_at: locations of hybrid runs from the dense to the sparse model.
            leave_at: locations of hybrid runs from the sparse to the dense model.
            loss_weights: weights of the terms in `loss`, by the names in `LOSS_TERMS`; 1 if not
                given.
        """
        dense, sparse = self.dense_stream, self.sparse_stream
        mask = None if attention_mask is None else attention_mask.bool()
        with torch.no_grad():
            x, dense_context = dense.embed(input_ids, attention_mask)
            dense_run = dense.run(x, dense_context)
            dense_logits = dense.logits(dense_run[-1], dense_context)
        x, sparse_context = sparse.embed(input_ids, attention_mask)
        sparse_run = sparse.run(x, sparse_context)
        sparse_logits = sparse.logits(sparse_run[-1], sparse_context)

        encoded = [self.encode(x, i) for i, x in enumerate(dense_run)]
        decoded = [self.decode(x, i) for i, x in enumerate(sparse_run)]

        def errors(estimates: list[torch.Tensor], targets: list[torch.Tensor]) -> torch.Tensor:
            pairs = zip(estimates, targets, strict=True)
            return torch.stack([normalized_mse(*pair, mask) for pair in pairs])

        terms = {
            "kl": mean_kl(dense_logits, sparse_logits, mask),
            "encode_nmse": errors(encoded, sparse_run),
            "decode_nmse": errors(decoded, dense_run),
        }
        terms["nmse"] = (terms["encode_nmse"] + terms["decode_nmse"]).mean()
        for stream, context, entries, locations, term in (
            (sparse, sparse_context, encoded, enter_at, "dense_to_sparse"),
            (dense, dense_context, decoded, leave_at, "sparse_to_dense"),
        ):
            kls = []
            for location in locations:
                x = entries[check_location(self.sparse, location)]
                logits = stream.logits(stream.run(x, context, location)[-1], context)
                kls.append(mean_kl(dense_logits, logits, mask))
            if kls:
                terms[f"{term}_kl"] = torch.stack(kls)
                terms[term] = terms[f"{term}_kl"].mean()
        if labels is not None:
            terms["lm"] = F.cross_entropy(
                sparse_logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten()
            )
            weights = {name: 1.0 for name in LOSS_TERMS} | dict(loss_weights or {})
            terms["loss"] = sum(weights[name] * terms[name] for name in LOSS_TERMS if name in terms)
        return BridgeOutput(**terms, sparse_logits=sparse_logits, dense_logits=dense_logits)

    @contextmanager
    def steer(
        self,
        where: int | str,
        channel: int,
        strength: float,
        *,
        mode: str = "add",
        positions: int | Sequence[int] | None = None,
    ) -> Iterator["BridgedCausalLM"]:
        """Within the block, the dense model runs with one sparse channel moved.

        The change of the channel is decoded and added to the dense stream, in every forward pass
        of `.dense`, also within `generate`.

        Args:
            where: a location, or one of the sparse model's node sites that are read from or written
                to the residual stream (`h.{i}.attn.act_in`, `.resid_delta`, `h.{i}.mlp.act_in`,
                `.resid_delta`), or `h.{i}.attn.v`, `h.{i}.mlp.post_act`, whose weights into the
                stream are followed.
            channel: index of the channel there.
            strength: by how much (`mode="add"`) or to which value (`"set"`) the channel is moved,
                as it is in the sparse model.
            mode: `"add"`, or `"set"` at a location or residual site.
            positions: token positions of each forward pass (-1 is the last); all if `None`.

        Raises:
            ValueError: there is no such location, site or channel, or it cannot be steered.
        """
        if mode not in ("add", "set"):
            raise ValueError(f"mode={mode!r} is not known; use 'add' or 'set'.")
        point = steering_point(self.sparse, where, channel)
        if mode == "set" and not point.is_residual:
            raise ValueError(
                f"mode=\"set\" needs the channel's value, which the dense model's stream does not "
                f'hold for {where}; use mode="add", or a residual site.'
            )
        bridge = self.bridges[point.location]
        direction = bridge.decode_change(point.direction).detach()

        def edit(x: torch.Tensor) -> torch.Tensor:
            change = strength
            if mode == "set":
                change = strength - bridge.encode(x)[..., channel, None]
            delta = (change * direction).to(x.dtype).expand_as(x)
            if positions is None:
                return x + delta
            length = x.shape[1]
            chosen = [positions] if isinstance(positions, int) else positions
            chosen = [p for p in chosen if -length <= p < length]
            x = x.clone()
            x[:, chosen] += delta[:, chosen]
            return x

        with temporary_hooks(self.dense_stream.add_edit(point.location, edit)):
            yield self


def default_sparse_config(dense: PreTrainedModel, **fields: Any) -> CircuitGPTConfig:
    """Config of a sparse model as deep and wide as `dense`, of the same vocabulary and context.

    Args:
        dense: a causal language model.
        fields: other fields, or these with other values.
    """
    config, same = dense.config, ("vocab_size", "eos_token_id", "bos_token_id", "pad_token_id")
    sizes = {
        "n_layer": decoder_of(dense).depth,
        "d_model": config.hidden_size,
        "block_size": config.max_position_embeddings,
    }
    return CircuitGPTConfig(**(sizes | {name: getattr(config, name) for name in same} | fields))


def check_pair(dense: PreTrainedModel, sparse: CircuitGPTConfig) -> None:
    """Raise a `ValueError` if no bridges can be built between the two."""
    decoder = decoder_of(dense)
    decoder.check_sequential()
    depth = decoder.depth
    if depth != sparse.n_layer:
        raise ValueError(
            f"The dense model has {depth} layers and the sparse one {sparse.n_layer}, but bridges "
            f"join the same location of both; pass a sparse model with n_layer={depth}."
        )
    if dense.config.vocab_size != sparse.vocab_size:
        raise ValueError(
            f"The dense model has a vocabulary of {dense.config.vocab_size} tokens and the sparse "
            f"one of {sparse.vocab_size}, but both must read the same tokens; train the sparse "
            "model with the dense one's tokenizer."
        )
