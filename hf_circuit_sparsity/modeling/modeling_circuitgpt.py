"""CircuitGPT: the weight-sparse GPT of Gao et al. 2025 (arXiv 2511.13653) as a `PreTrainedModel`.

GPT-2 style decoder with AbsTopK at every site a circuit can be cut at ([`NodeSite`]), RMSNorm,
attention sinks, and a dense bigram table beside the sparse weights; parameter names are OpenAI's.

Shapes in comments: B batch, T tokens, D `d_model`, H heads, K `d_head`, V vocabulary.
"""

import importlib
import math
import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationConfig, GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_circuitgpt import CircuitGPTConfig
from .functional import abs_topk, eager_attention_forward, sdpa_attention_with_sink
from .sparse_checkpoint import SparsePreTrainedModel

logger = logging.get_logger(__name__)


class AbsTopK(nn.Module):
    """Keeps the k largest activations by magnitude, all of them where k is None."""

    def __init__(self, width: int, k: int | None = None):
        super().__init__()
        self.width, self.k = width, k

    def forward(self, x: Tensor) -> Tensor:
        return x if self.k is None else abs_topk(x, self.k)

    def extra_repr(self) -> str:
        return f"width={self.width}, k={self.k}"


class NodeSite(AbsTopK):
    """A place where a circuit can be cut: one node per channel, `(B, T, width)` in and out. Record
    or ablate its nodes with an ordinary `register_forward_hook`."""


def make_norm(config: CircuitGPTConfig, width: int) -> nn.Module:
    if config.rms_norm:  # OpenAI's were trained in float32; torch's default depends on the dtype
        return nn.RMSNorm(width, eps=torch.finfo(torch.float32).eps)
    return nn.LayerNorm(width, eps=1e-5, bias=config.ln_bias)


class AttentionSink(nn.Module):
    """The per-head logit, `(H,)`, that only enters the softmax denominator."""

    def __init__(self, n_head: int):
        super().__init__()
        self.sink_logit = nn.Parameter(torch.zeros(n_head))

    def forward(self) -> Tensor:
        return self.sink_logit


class CircuitGPTAttention(nn.Module):
    def __init__(self, config: CircuitGPTConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx, self.is_causal = config, layer_idx, True
        self.head_dim, self.scaling = config.d_head, config.d_head**-0.5
        inner = config.n_head * config.d_head
        self.act_in = NodeSite(config.d_model_in, config.site_k("attn_in"))
        self.c_attn = nn.Linear(config.d_model_in, 3 * inner, bias=config.bias)
        self.q, self.k, self.v = (NodeSite(inner, config.site_k(f"attn_{s}")) for s in "qkv")
        self.attn_imp = AttentionSink(config.n_head) if config.sink else None
        self.c_proj = nn.Linear(inner, config.d_model, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.resid_delta = NodeSite(config.d_model, config.site_k("attn_out"))

    def forward(
        self, x: Tensor, attention_mask: Tensor | None = None, past_key_values: Cache | None = None,
        cache: Any = None, **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        q, k, v = self.c_attn(self.act_in(x)).chunk(3, dim=-1)
        read = (self.q(q), self.k(k), self.v(v))
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in read)
        # (B, H, T, K), of which a hook may have left fewer queries.
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        if cache is not None:  # of continuous batching; transformers' attention for it has no sinks
            new = "kwargs" in cache.update.__code__.co_varnames  # transformers later than 5.17
            at = (kwargs,) if new else (kwargs["read_index"], kwargs["write_index"])
            k, v = cache.update(k, v, self.layer_idx, *at)
            k, v = (part if new else part.transpose(0, 1)[None] for part in (k, v))
        name = self.config._attn_implementation.removeprefix("paged|") if x.numel() else "eager"
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
        if self.attn_imp is not None:
            kwargs["s_aux"] = self.attn_imp()  # transformers' name for attention sinks
            attend = sdpa_attention_with_sink if name == "sdpa" else attend
        dropout = self.config.dropout if self.training else 0.0
        y, weights = attend(
            self, q, k, v, attention_mask, scaling=self.scaling, dropout=dropout, **kwargs
        )
        y = self.c_proj(y.flatten(2))
        return self.resid_delta(self.resid_dropout(y)), weights


class CircuitGPTMLP(nn.Module):
    def __init__(self, config: CircuitGPTConfig):
        super().__init__()
        self.act_in = NodeSite(config.d_model_in, config.site_k("mlp_in"))
        self.c_fc = nn.Linear(config.d_model_in, config.d_mlp, bias=config.bias)
        self.act_fn = nn.GELU() if config.activation_type == "gelu" else nn.ReLU()
        self.post_act = NodeSite(config.d_mlp, config.site_k("mlp_neuron"))
        self.c_proj = nn.Linear(config.d_mlp, config.d_model, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)
        self.resid_delta = NodeSite(config.d_model, config.site_k("mlp_out"))

    def forward(self, x: Tensor) -> Tensor:
        neurons = self.post_act(self.act_fn(self.c_fc(self.act_in(x))))
        return self.resid_delta(self.dropout(self.c_proj(neurons)))


class CircuitGPTBlock(GradientCheckpointingLayer):
    def __init__(self, config: CircuitGPTConfig, layer_idx: int):
        super().__init__()
        self.ln_1 = make_norm(config, config.d_model)
        self.attn = CircuitGPTAttention(config, layer_idx)
        self.ln_2 = make_norm(config, config.d_model)
        self.mlp = CircuitGPTMLP(config)
        if config.d_pos_emb is not None:
            self.ln_p1 = make_norm(config, config.d_pos_emb)
            self.ln_p2 = make_norm(config, config.d_pos_emb)
        relu = config.residual_activation_type == "relu"
        self.residual_act = nn.ReLU() if relu else nn.Identity()
        self.resid_post_attn = AbsTopK(config.d_model, config.site_k("resid_post_attn"))
        self.resid_post_mlp = AbsTopK(config.d_model, config.site_k("resid_post_mlp"))

    def forward(self, x: Tensor, positions: Tensor | None = None, *args: Any, **kwargs: Any):
        """`x` is `(B, T, D)`; positions, where they are concatenated, `(B or 1, T, d_pos_emb)`."""
        x, weights = self.after_attention(x, positions, *args, **kwargs)
        return self.after_mlp(x, positions), weights

    def after_attention(
        self, x: Tensor, positions: Tensor | None = None, attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None, **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """The residual stream after the attention, from the one before it; and the weights."""
        read = self.ln_1(x)
        if positions is not None:
            read = torch.cat([read, self.ln_p1(positions).expand(len(x), -1, -1)], dim=-1)
        delta, weights = self.attn(read, attention_mask, past_key_values, **kwargs)
        return self.resid_post_attn(self.residual_act(x + delta)), weights

    def after_mlp(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """The residual stream after the MLP, from the one before it."""
        read = self.ln_2(x)
        if positions is not None:
            read = torch.cat([read, self.ln_p2(positions).expand(len(x), -1, -1)], dim=-1)
        return self.resid_post_mlp(self.residual_act(x + self.mlp(read)))


class SinusoidalPositions(nn.Module):
    """Frozen positions `(block_size, width)`: sines, then cosines, periods 4 to all tokens."""

    def __init__(self, block_size: int, width: int):
        super().__init__()
        self.register_buffer("weight", torch.empty(block_size, width))
        self.weight = self.table()

    def forward(self, position_ids: Tensor) -> Tensor:
        return F.embedding(position_ids, self.weight)

    def table(self) -> Tensor:
        length, width = self.weight.shape
        periods = torch.logspace(math.log10(4.0), math.log10(max(4.0, length)), max(1, width // 2))
        angles = torch.arange(length)[:, None] * (2 * math.pi / periods)
        table = torch.cat([angles.sin(), angles.cos()], dim=1)[:, :width]
        return F.pad(table, (0, width - table.shape[1]))


class CircuitGPTPreTrainedModel(SparsePreTrainedModel):
    config_class = CircuitGPTConfig
    base_model_prefix = "transformer"
    _input_embed_layer = "wte"
    supports_gradient_checkpointing = True
    _no_split_modules = ["CircuitGPTBlock"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True  # not flex attention: that of transformers refuses sinks on the CPU
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    run_blocks = staticmethod(lambda *args: None)  # the package's is faster; see blocks.py
    _can_record_outputs = {"hidden_states": CircuitGPTBlock, "attentions": CircuitGPTAttention}  # noqa: RUF012
    # Older releases lack the first; the others are causal or pruning masks stored as buffers.
    _keys_to_ignore_on_load_missing = ["final_logits_bias"]  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = [r"\.attn\.(masked_)?bias$", r"(^|[._])mask$"]  # noqa: RUF012

    def __init__(self, config: CircuitGPTConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.model_tags = ["circuitgpt", "weight-sparse"]  # for the card that push_to_hub writes

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, SinusoidalPositions):
            init.copy_(module.weight, module.table())
        elif isinstance(module, AttentionSink):
            init.zeros_(module.sink_logit)
        elif isinstance(module, CircuitGPTForCausalLM):
            init.zeros_(module.final_logits_bias)
            if module.bigram_table is not None:
                init.zeros_(module.bigram_table)

    def node_sites(self) -> dict[str, NodeSite]:
        """Where a circuit can be cut, in the order of computation: `h.{i}.attn.act_in, .q, .k, .v,
        .resid_delta` and `h.{i}.mlp.act_in, .post_act, .resid_delta`."""
        return {n[n.index("h.") :]: m for n, m in self.named_modules() if isinstance(m, NodeSite)}


class CircuitGPTModel(CircuitGPTPreTrainedModel):
    """The transformer without its unembedding."""

    def __init__(self, config: CircuitGPTConfig):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.d_model)
        positions = SinusoidalPositions if config.sinusoidal_cat_pos_emb else nn.Embedding
        size = (config.block_size, config.d_pos_emb or config.d_model)
        self.wpe = positions(*size) if config.use_positional_embeddings else None
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList([CircuitGPTBlock(config, i) for i in range(config.n_layer)])
        self.ln_f = make_norm(config, config.d_model)
        self.gradient_checkpointing = False
        self.post_init()

    def position_ids_for(
        self, x: Tensor, attention_mask: Tensor | None, past_key_values: Cache | None
    ) -> Tensor:
        """Positions `(B or 1, T)` of the tokens embedded in `x`; padding does not count."""
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        needed = past + x.shape[1]
        positions = torch.arange(past, needed, device=x.device)[None]
        if attention_mask is not None and attention_mask.dim() == 2:
            positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -x.shape[1] :]
        if needed > self.config.block_size:  # rarely; padding may be all that is too long
            self.check_positions(positions)
        return positions

    def check_positions(self, position_ids: Tensor) -> None:
        needed = int(position_ids.max()) + 1 if position_ids.numel() else 0
        if needed > (most := self.config.block_size):
            raise ValueError(f"{needed} tokens were passed, expected at most block_size={most}.")

    def embedded(
        self, x: Tensor, attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None, past_key_values: Cache | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
        """What the first block gets for token embeddings `x` `(B, T, D)`.

        Returns:
            The residual stream `(B, T, D)`, concatenated positions (`None` where they are added),
            and the attention mask in the form that the attention implementation wants.
        """
        config = self.config
        if position_ids is None:
            position_ids = self.position_ids_for(x, attention_mask, past_key_values)
        elif x.device.type == "cpu" and not torch.compiler.is_compiling():
            self.check_positions(position_ids)  # elsewhere that would wait for the device
        positions = None if self.wpe is None else self.wpe(position_ids).to(x.device)
        if config.d_pos_emb is None:
            x, positions = x if positions is None else x + positions, None
        elif config.dropout_cat_pos_emb:
            positions = self.drop(positions)
        x = self.drop(x)
        mask = create_causal_mask(
            config=config, inputs_embeds=x, attention_mask=attention_mask,
            past_key_values=past_key_values, position_ids=position_ids,
        )  # fmt: skip
        return x, positions, mask

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self, input_ids: torch.LongTensor | None = None, attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None, past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None, use_cache: bool | None = None, **kwargs: Any,
    ) -> BaseModelOutputWithPast:  # fmt: skip
        """
        Args:
            input_ids: `(B, T)` token ids; or pass `inputs_embeds`, `(B, T, D)`, instead.
            attention_mask: `(B, past + T)`, 1 for tokens and 0 for padding on either side.
            position_ids: `(B, T)`; counted from the attention mask if not given.
            past_key_values: cache of the tokens before these.
            output_hidden_states: also return the residual stream before every block and, last,
                after the final norm: `n_layer + 1` tensors `(B, T, D)`.
            output_attentions: also return `n_layer` tensors `(B, H, T, past + T)`; needs
                `attn_implementation="eager"`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            passed = "neither" if input_ids is None else "both"
            raise ValueError(f"Expected one of input_ids and inputs_embeds; {passed} was passed.")
        given = self.config._attn_implementation
        if kwargs.get("output_attentions") and given != "eager":
            logger.warning_once(f"output_attentions=True needs 'eager' attention, not {given!r}.")
        x = self.wte(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        x, positions, mask = self.embedded(x, attention_mask, position_ids, past_key_values)
        done = None if kwargs else self.run_blocks(x, positions, mask, past_key_values)
        for block in self.h if done is None else ():
            x, _ = block(x, positions, mask, past_key_values, **kwargs)
        x = x if done is None else done
        return BaseModelOutputWithPast(self.ln_f(x), past_key_values if use_cache else None)


class CircuitGPTForCausalLM(CircuitGPTPreTrainedModel, GenerationMixin):
    """CircuitGPT with its unembedding, logits bias and bigram table."""

    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}  # noqa: RUF012

    def __init__(self, config: CircuitGPTConfig):
        super().__init__(config)
        self.transformer = CircuitGPTModel(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.register_buffer("final_logits_bias", torch.zeros(config.vocab_size))
        table = torch.zeros([config.vocab_size] * 2) if config.enable_bigram_table else None
        if table is not None and config.learnable_bigram_table:
            self.bigram_table = nn.Parameter(table)
        else:
            self.register_buffer("bigram_table", table)
        self.final_logits = nn.Identity()  # for hooks: the logits before the loss
        self.post_init()

    @classmethod
    def from_openai(cls, folder: str | os.PathLike, **config_overrides: Any):
        """Load OpenAI's blob layout: a folder with `beeg_config.json` and `final_model.pt`.

        Args:
            folder: where the two are; only the package reads them, no code beside a model.
            config_overrides: config fields to set over those read.

        Raises:
            FileNotFoundError, ValueError: a file is missing, unreadable or does not fit the other.
        """
        reader = importlib.import_module("hf_circuit_sparsity.modeling.openai_checkpoint")
        return reader.load_openai_checkpoint(cls, folder, **config_overrides)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any
    ) -> nn.Embedding:
        """Resizes everything that has the vocabulary's size; new bigram entries are zero."""
        embedding = super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        size = embedding.num_embeddings
        for name in ("final_logits_bias", "bigram_table"):
            if (table := getattr(self, name)) is None:
                continue
            common = (slice(min(size, len(table))),) * table.dim()
            new = table.data.new_zeros([size] * table.dim())
            new[common] = table.data[common]
            is_parameter = isinstance(table, nn.Parameter)
            setattr(self, name, nn.Parameter(new, table.requires_grad) if is_parameter else new)
        return embedding

    def prepare_inputs_for_generation(
        self, input_ids: torch.LongTensor, *args: Any, inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:  # fmt: skip
        """As ever; where embeddings come with ids, these are passed on too, for the bigrams."""
        kwargs["inputs_embeds"] = inputs_embeds  # named, as transformers looks for it
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        embeds = inputs.get("inputs_embeds")
        if self.bigram_table is not None and embeds is not None and input_ids.shape[1]:
            inputs["input_ids"] = input_ids
        return inputs

    def generate_batch(
        self, inputs: list, generation_config: Any = None, *args: Any, **kwargs: Any
    ):
        """As ever; refuses what may outgrow `block_size`, as one such text stops all of them."""
        new = kwargs.get("max_new_tokens")
        new = new or (generation_config or self.generation_config).max_new_tokens or 0
        if (longest := max(map(len, inputs), default=0)) + new > self.config.block_size:
            tokens = f"{longest} tokens and max_new_tokens={new} were passed"
            raise ValueError(f"{tokens}, expected at most block_size={self.config.block_size}.")
        return super().generate_batch(inputs, generation_config, *args, **kwargs)

    def _prepare_generated_length(self, generation_config: GenerationConfig, **kwargs: Any):
        config = super()._prepare_generated_length(generation_config, **kwargs)
        # Embeddings without ids do not count as the beginning of the text.
        given, block_size = kwargs["inputs_tensor"].shape[1], self.config.block_size
        if given >= block_size:
            raise ValueError(f"{given} tokens fill block_size={block_size}; generate from fewer.")
        longest = block_size - given + kwargs["input_ids_length"]
        if config.max_length > longest:
            logger.warning_once(f"Text is generated up to block_size={self.config.block_size}.")
            config.max_length = longest
        return config

    def unembed(self, hidden: Tensor, input_ids: torch.LongTensor | None) -> Tensor:
        """Logits `(B, T, V)` from the output of the final norm, `(B, T, D)`, and its tokens."""
        logits = self.lm_head(hidden) + self.final_logits_bias.to(hidden.dtype)
        if self.bigram_table is not None:
            bigrams = F.embedding(input_ids.to(self.bigram_table.device), self.bigram_table)
            logits = logits + bigrams.to(device=logits.device, dtype=logits.dtype)
        return self.final_logits(logits)

    @can_return_tuple
    def forward(
        self, input_ids: torch.LongTensor | None = None, attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None, past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None, labels: torch.LongTensor | None = None,
        use_cache: bool | None = None, logits_to_keep: int | Tensor = 0, **kwargs: Any,
    ) -> CausalLMOutputWithPast:  # fmt: skip
        """
        Args:
            input_ids: as of [`CircuitGPTModel.forward`]; a bigram table needs them in any case, and
                then `inputs_embeds` may be passed beside them.
            labels: `(B, T)` token ids, shifted inside the model, -100 where no loss is wanted.
                `shift_labels`, already shifted, is taken as well.
            logits_to_keep: compute only the last so many positions' logits (0: all), or the
                positions at these indices.

        Returns:
            loss (scalar, mean cross-entropy in nats), logits `(B, T, V)`, the cache, and hidden
            states and attentions as of [`CircuitGPTModel.forward`].
        """
        stream_ids = input_ids
        if self.bigram_table is not None and inputs_embeds is not None:
            if input_ids is None:
                raise ValueError(
                    "inputs_embeds was passed without input_ids, but the bigram table needs ids; "
                    "pass both of equal length, or take a model with enable_bigram_table=False."
                )
            stream_ids = None
        outputs = self.transformer(
            stream_ids, attention_mask, position_ids, past_key_values, inputs_embeds,
            use_cache=use_cache, return_dict=True, **kwargs,
        )  # fmt: skip
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden = outputs.last_hidden_state[:, keep]
        logits = self.unembed(hidden, None if input_ids is None else input_ids[:, keep])
        loss = None
        if labels is not None or kwargs.get("shift_labels") is not None:
            loss = self.loss_function(logits, labels, vocab_size=logits.shape[-1], **kwargs)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states, attentions=outputs.attentions,
        )  # fmt: skip
