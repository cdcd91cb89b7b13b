"""A sparse twin of a dense model, and the bridges between the two (Gao et al. 2025, METHOD 4).

The dense model is frozen and somebody's own; the twin is a [`CircuitGPTForCausalLM`] of the same
depth that can be read. At every residual location (see `residual_streams.py`) an encoder, linear
with AbsTopK behind it, maps the dense stream to the sparse one, and a linear decoder maps back.

Shapes in comments: B batch, T tokens, V vocabulary, 2L + 1 locations.
"""

import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from ..decoders.residual_stream import ResidualStream, residual_stream
from ..modeling.configuration_circuitgpt import CircuitGPTConfig
from ..modeling.fingerprint import model_fingerprint
from ..modeling.modeling_circuitgpt import CircuitGPTForCausalLM
from .bridge_layer import Bridge
from .checkpoint import load_bridge, load_dense, save_bridge
from .configuration_bridge import BridgeConfig
from .intervention import steered
from .losses import mean_kl, normalized_mse

# The five loss terms, by the name of their weight.
LOSS_TERMS = ("lm", "kl", "nmse", "dense_to_sparse", "sparse_to_dense")


@dataclass
class BridgeOutput(ModelOutput):
    """What [`BridgedCausalLM`] returns; all losses in nats per token or shares, averaged.

    Attributes:
        loss: weighted sum of the terms below; `None` without `labels`.
        lm: cross-entropy of the sparse twin.
        kl: KL(dense ‖ sparse).
        nmse: mean over locations of `encode_nmse + decode_nmse`.
        dense_to_sparse, sparse_to_dense: mean over the hybrid runs asked for of KL(dense ‖ hybrid).
        encode_nmse, decode_nmse: `(2L + 1,)`, error of the encoded dense stream against the sparse
            one and of the decoded sparse stream against the dense one, over the target's variance.
        dense_to_sparse_kl, sparse_to_dense_kl: the hybrids' KL one by one, in the order asked for.
        sparse_logits, dense_logits: `(B, T, V)`.
    """

    loss: torch.Tensor | None = None
    lm: torch.Tensor | None = None
    kl: torch.Tensor | None = None
    nmse: torch.Tensor | None = None
    dense_to_sparse: torch.Tensor | None = None
    sparse_to_dense: torch.Tensor | None = None
    encode_nmse: torch.Tensor | None = None
    decode_nmse: torch.Tensor | None = None
    dense_to_sparse_kl: torch.Tensor | None = None
    sparse_to_dense_kl: torch.Tensor | None = None
    sparse_logits: torch.Tensor | None = None
    dense_logits: torch.Tensor | None = None


class BridgedCausalLM(PreTrainedModel):
    """A frozen dense model, its sparse twin and the bridges between them.

    Make one with [`from_models`], train it with `BridgeTrainer`, save it with `save_pretrained`
    (without the dense weights) and load it with `from_pretrained`. `.dense` and `.sparse` are
    ordinary models; what the twin is found to do can be tried on the dense one with [`steer`].
    """

    config_class = BridgeConfig
    accepts_loss_kwargs = False

    def __init__(self, config: BridgeConfig, dense: PreTrainedModel):
        super().__init__(config)
        twin = config.twin_config()
        check_pair(dense, twin)
        self.dense = dense.requires_grad_(False).eval()
        self.sparse = CircuitGPTForCausalLM(twin)
        k = None if config.encoder_afrac is None else int(config.encoder_afrac * twin.d_model)
        if k is not None and k < 1:
            raise ValueError(
                f"encoder_afrac={config.encoder_afrac} keeps none of the {twin.d_model} channels "
                "of the sparse twin; use a larger fraction or a wider twin."
            )
        self.bridges = nn.ModuleList(
            Bridge(dense.config.hidden_size, twin.d_model, k, config.bridge_bias)
            for _ in range(2 * twin.n_layer + 1)
        )
        self.post_init()

    def init_weights(self) -> None:
        """Nothing: the twin and the bridges come initialized, the dense model trained."""

    @classmethod
    def from_models(
        cls,
        dense: PreTrainedModel | str,
        sparse: CircuitGPTForCausalLM | CircuitGPTConfig | None = None,
        *,
        encoder_afrac: float | None = 0.25,
        bridge_bias: bool = True,
    ) -> "BridgedCausalLM":
        """Fresh bridges between a dense model and a sparse one.

        Args:
            dense: a causal language model (CircuitGPT, GPT-2 or Llama architecture), or the folder
                or Hub id of one. It is frozen.
            sparse: the twin, or the config of a fresh one; by default a CircuitGPT as wide as the
                dense model.
            encoder_afrac, bridge_bias: see [`BridgeConfig`].

        Raises:
            ValueError: an unknown architecture, or depths or vocabularies that differ.
        """
        if isinstance(dense, (str, os.PathLike)):
            dense = load_dense(dense)
        stream = residual_stream(dense)
        if sparse is None:
            sparse = default_twin(dense)
        twin = sparse if isinstance(sparse, CircuitGPTConfig) else sparse.config
        check_pair(dense, twin)
        config = BridgeConfig(
            sparse_config=twin.to_dict(),
            base_model_name_or_path=str(dense.config.name_or_path or ""),
            base_model_fingerprint=model_fingerprint(dense),
            base_model_type=stream.model.config.model_type,
            base_width=dense.config.hidden_size,
            encoder_afrac=encoder_afrac,
            bridge_bias=bridge_bias,
        )
        bridged = cls(config, dense)
        if not isinstance(sparse, CircuitGPTConfig):
            bridged.sparse.load_state_dict(sparse.state_dict())
        return bridged

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *,
        dense: PreTrainedModel | str | os.PathLike | None = None,
        config: BridgeConfig | None = None,
        check_base_model: bool = True,
        **kwargs: Any,
    ) -> "BridgedCausalLM":
        """Load a saved bridge and the dense model it belongs to.

        Args:
            pretrained_model_name_or_path: folder or Hub id of the bridge.
            dense: the dense model, or where it is; by default where the bridge says it was.
            config: the bridge's, if it has been loaded already.
            check_base_model: compare the dense model's weights with those the bridge was trained
                with. A quantized model needs `False`.
            kwargs: `dtype` and `device_map` of the dense model, `trust_remote_code`, and where on
                the Hub (`revision`, `token`, `cache_dir`, ...).

        Raises:
            ValueError: the bridge is damaged, or was trained for another dense model.
            OSError: a file or the dense model was not found.
        """
        return load_bridge(
            cls, pretrained_model_name_or_path, dense, config, check_base_model, kwargs
        )

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Write twin and bridges as an adapter folder, without the dense weights.

        `adapter_config.json` and `adapter_model.safetensors` are what PEFT reads, `config.json` and
        the code beside it what `trust_remote_code=True` reads.
        """
        if push_to_hub:
            raise ValueError("push_to_hub=True is not taken here; call push_to_hub(repo_id).")
        if is_main_process:
            save_bridge(self, save_directory, state_dict)

    def get_input_embeddings(self) -> nn.Module:
        return self.sparse.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.sparse.get_output_embeddings()

    def train(self, mode: bool = True) -> "BridgedCausalLM":
        """As ever, but the dense model stays in evaluation mode: it is not trained."""
        super().train(mode)
        self.dense.eval()
        return self

    @property
    def dense_stream(self) -> ResidualStream:
        """Where the dense model's residual stream is."""
        return residual_stream(self.dense)

    @property
    def sparse_stream(self) -> ResidualStream:
        """Where the twin's residual stream is."""
        return residual_stream(self.sparse)

    @property
    def n_locations(self) -> int:
        """2L + 1."""
        return len(self.bridges)

    def check_location(self, location: int) -> int:
        """Return `location` if there is one of this number.

        Raises:
            ValueError: there is not; says which there are.
        """
        whole = isinstance(location, int) and not isinstance(location, bool)
        if not whole or not 0 <= location < self.n_locations:
            raise ValueError(
                f"There is no location {location!r}: this model of {self.sparse.config.n_layer} "
                f"layers has 0 (after the embedding) to {self.n_locations - 1} (after the last "
                "MLP); 2i + 1 is after the attention of layer i, 2i + 2 after its MLP."
            )
        return location

    def encode(self, x: torch.Tensor, location: int) -> torch.Tensor:
        """Dense residual stream `(..., dense width)` to sparse, `(..., d_model)`."""
        return self.bridges[self.check_location(location)].encode(x)

    def decode(self, x: torch.Tensor, location: int) -> torch.Tensor:
        """Sparse residual stream `(..., d_model)` to dense, `(..., dense width)`."""
        return self.bridges[self.check_location(location)].decode(x).to(self.dense.dtype)

    def hybrid(
        self,
        input_ids: torch.LongTensor,
        enter: int | None = None,
        leave: int | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits `(B, T, V)` of a run that uses the sparse twin from `enter` to `leave`.

        Args:
            input_ids: `(B, T)`.
            enter: location at which the run goes from the dense model to the twin; if `None` it
                begins in the twin.
            leave: location at which it goes back to the dense model; if `None` it ends in the twin.
            attention_mask: `(B, T)`, 0 for padding.

        Raises:
            ValueError: neither is given, there is no such location, or `leave` is before `enter`.
        """
        if enter is None and leave is None:
            raise ValueError(
                "hybrid was called without enter and leave, so the run would never switch; give "
                "one, or call .sparse."
            )
        first = 0 if enter is None else self.check_location(enter)
        if leave is not None and self.check_location(leave) < first:
            raise ValueError(f"leave={leave} is before enter={enter}; leave at it or later.")
        dense, sparse = self.dense_stream, self.sparse_stream
        x, sparse_context = sparse.embed(input_ids, attention_mask)
        if enter is not None or leave is not None:
            dense_x, dense_context = dense.embed(input_ids, attention_mask)
        if enter is not None:
            x = self.encode(dense.run(dense_x, dense_context, 0, enter)[-1], enter)
        x = sparse.run(x, sparse_context, first, leave)[-1]
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
        """Run both models and say how far apart they are.

        Args:
            input_ids: `(B, T)`.
            attention_mask: `(B, T)`, 0 for padding, which counts in no term.
            labels: `(B, T)`, as for every causal language model; without them there is no `lm`
                term and no `loss`.
            enter_at: locations of hybrid runs that go from the dense model to the twin.
            leave_at: locations of hybrid runs that go from the twin to the dense model.
            loss_weights: weights of the terms in `loss`, by the names in `LOSS_TERMS`; 1 if not
                given.
        """
        dense, sparse = self.dense_stream, self.sparse_stream
        real = None if attention_mask is None else attention_mask.bool()
        with torch.no_grad():
            x, dense_context = dense.embed(input_ids, attention_mask)
            dense_run = dense.run(x, dense_context)
            dense_logits = dense.logits(dense_run[-1], dense_context)
        x, sparse_context = sparse.embed(input_ids, attention_mask)
        sparse_run = sparse.run(x, sparse_context)
        sparse_logits = sparse.logits(sparse_run[-1], sparse_context)

        encoded = {i: self.encode(x, i) for i, x in enumerate(dense_run)}
        decoded = {i: self.decode(x, i) for i, x in enumerate(sparse_run)}
        encode_nmse = [normalized_mse(encoded[i], x, real) for i, x in enumerate(sparse_run)]
        decode_nmse = [normalized_mse(decoded[i], x, real) for i, x in enumerate(dense_run)]
        found = {
            "kl": mean_kl(dense_logits, sparse_logits, real),
            "encode_nmse": torch.stack(encode_nmse),
            "decode_nmse": torch.stack(decode_nmse),
        }
        found["nmse"] = (found["encode_nmse"] + found["decode_nmse"]).mean()
        for stream, context, starts, places, term in (
            (sparse, sparse_context, encoded, enter_at, "dense_to_sparse"),
            (dense, dense_context, decoded, leave_at, "sparse_to_dense"),
        ):
            if not places:
                continue
            kls = []
            for location in places:
                x = stream.run(starts[self.check_location(location)], context, location)[-1]
                kls.append(mean_kl(dense_logits, stream.logits(x, context), real))
            found[f"{term}_kl"] = torch.stack(kls)
            found[term] = found[f"{term}_kl"].mean()
        if labels is not None:
            found["lm"] = F.cross_entropy(
                sparse_logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten()
            )
            weights = {name: 1.0 for name in LOSS_TERMS} | dict(loss_weights or {})
            found["loss"] = sum(weights[name] * found[name] for name in LOSS_TERMS if name in found)
        return BridgeOutput(**found, sparse_logits=sparse_logits, dense_logits=dense_logits)

    def steer(
        self,
        where: int | str,
        channel: int,
        strength: float,
        *,
        mode: str = "add",
        positions: int | Sequence[int] | None = None,
    ) -> AbstractContextManager["BridgedCausalLM"]:
        """Within the block, the dense model runs with one sparse channel moved.

        The channel is moved in the encoded stream, the difference decoded and added to the dense
        stream; so in every forward pass of `.dense`, also within `generate`.

        Args:
            where: a location, or one of the twin's node sites that are read from or written to the
                residual stream (`h.{i}.attn.act_in`, `.resid_delta`, `h.{i}.mlp.act_in`,
                `.resid_delta`), or `h.{i}.attn.v`, `h.{i}.mlp.post_act`, whose weights into the
                stream are followed.
            channel: index of the channel there.
            strength: by how much (`mode="add"`) or to which value (`"set"`) the channel is moved,
                in the twin's own units.
            mode: `"add"`, or `"set"` at a location or residual site.
            positions: at which tokens of each forward pass, as indices (-1 is the last); all if
                `None`.

        Raises:
            ValueError: there is no such location, site or channel, or it cannot be steered.
        """
        return steered(self, where, channel, strength, mode, positions)


def default_twin(dense: PreTrainedModel, **fields: Any) -> CircuitGPTConfig:
    """Config of a twin that fits `dense`: as deep, as wide, of the same vocabulary and context."""
    values = {
        "n_layer": residual_stream(dense).depth,
        "d_model": dense.config.hidden_size,
        "vocab_size": dense.config.vocab_size,
        "block_size": dense.config.max_position_embeddings,
        "eos_token_id": dense.config.eos_token_id,
        "bos_token_id": dense.config.bos_token_id,
        "pad_token_id": dense.config.pad_token_id,
    }
    return CircuitGPTConfig(**{**values, **fields})


def check_pair(dense: PreTrainedModel, twin: CircuitGPTConfig) -> None:
    """Raise a `ValueError` if no bridges can be built between the two."""
    depth = residual_stream(dense).depth
    if depth != twin.n_layer:
        raise ValueError(
            f"The dense model has {depth} layers and the sparse one {twin.n_layer}, but bridges "
            f"join the same place in both; pass a sparse model with n_layer={depth}."
        )
    if dense.config.vocab_size != twin.vocab_size:
        raise ValueError(
            f"The dense model has a vocabulary of {dense.config.vocab_size} tokens and the sparse "
            f"one of {twin.vocab_size}, but both must read the same tokens; train the sparse model "
            "with the dense one's tokenizer."
        )


__all__ = ["LOSS_TERMS", "Bridge", "BridgeConfig", "BridgeOutput", "BridgedCausalLM"]
