"""Configuration of CircuitGPT, the weight-sparse GPT of Gao et al. 2025 (arXiv 2511.13653).

The field names are those of OpenAI's released checkpoints, so that a released config is a valid
config here; `attribute_map` gives them the ecosystem's names as well.
"""

from typing import Any

from transformers import PreTrainedConfig

from .validation import CheckedConfig, Field

# Every place where AbsTopK may act, by OpenAI's name for it (METHOD: "activation sparsity").
ACTIVATION_SITES = (
    "attn_in",
    "attn_q",
    "attn_k",
    "attn_v",
    "attn_out",
    "mlp_in",
    "mlp_neuron",
    "mlp_out",
    "resid_post_attn",
    "resid_post_mlp",
)
PAPER_ACTIVATION_SITES = ",".join(ACTIVATION_SITES[:8])

# Far above any such model; what a file claims beyond costs minutes or overflows.
MAX_LAYERS = 1024
MAX_WIDTH = 1 << 24


class CircuitGPTConfig(CheckedConfig, PreTrainedConfig):
    """Architecture of a [`CircuitGPTForCausalLM`]. The defaults are the paper's largest model.

    Args:
        n_layer (`int`): transformer blocks.
        n_head (`int`, *optional*): attention heads; `d_model // d_head` if not given.
        d_model (`int`): width of the residual stream.
        d_head (`int`, *optional*): width of one head; `d_model // n_head` if only `n_head` is
            given, 16 (the paper's) if neither is. Need not be `d_model / n_head`.
        d_mlp (`int`, *optional*): neurons per MLP; `4 * d_model` if not given. Old name: `n_mlp`.
        block_size (`int`): longest sequence, in tokens.
        vocab_size (`int`): tokens in the vocabulary.
        rms_norm (`bool`): RMSNorm (so that zero keeps its meaning) instead of LayerNorm.
        bias (`bool`): biases in the linear layers.
        ln_bias (`bool`): biases in LayerNorm; RMSNorm has none.
        activation_type (`str`): `"gelu"` or `"relu"`, the neurons' nonlinearity.
        residual_activation_type (`str`): `"identity"`, or `"relu"` applied to the residual stream
            after every attention and MLP block.
        afrac (`float`, *optional*): fraction of activations AbsTopK keeps, k = int(afrac * width);
            `None` keeps all.
        afrac_loctypes (`str`): comma-separated sites at which AbsTopK acts, out of
            `ACTIVATION_SITES`.
        tied_unembed (`bool`): share the token embedding with the unembedding.
        sink (`bool`): a learnable logit per head that only enters the softmax denominator.
        enable_bigram_table (`bool`): a dense `vocab_size × vocab_size` table, looked up by the
            current token and added to the logits.
        learnable_bigram_table (`bool`): the table is a parameter rather than a buffer.
        d_pos_emb (`int`, *optional*): if given, positions of this width are normalised and
            concatenated to the input of every block, instead of added to the embedding.
        dropout_cat_pos_emb (`bool`): dropout on concatenated positions.
        sinusoidal_cat_pos_emb (`bool`): concatenated positions are frozen sinusoids.
        dropout (`float`): dropout after embedding, attention and MLP, and on attention weights.
        initializer_range (`float`): standard deviation of the initial weights.

    Raises:
        ValueError: a field of another type or outside its range, or heads that do not divide
            `d_model`; from a file, an `ArtifactError` that also names the file.

    Fields of a released config that are not listed here are kept as attributes.
    """

    model_type = "circuitgpt"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (transformers reads it so)
    attribute_map = {  # noqa: RUF012
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "head_dim": "d_head",
        "intermediate_size": "d_mlp",
        "max_position_embeddings": "block_size",
        "tie_word_embeddings": "tied_unembed",
    }

    n_layer: int = 8
    n_head: int | None = None
    d_model: int = 2048
    d_head: int | None = None
    d_mlp: int | None = None
    block_size: int = 256
    vocab_size: int = 2048
    rms_norm: bool = True
    bias: bool = True
    ln_bias: bool = True
    activation_type: str = "gelu"
    residual_activation_type: str = "identity"
    afrac: float | None = 0.25
    afrac_loctypes: str = PAPER_ACTIVATION_SITES
    tied_unembed: bool = False
    sink: bool = True
    enable_bigram_table: bool = True
    learnable_bigram_table: bool = True
    d_pos_emb: int | None = None
    dropout_cat_pos_emb: bool = False
    sinusoidal_cat_pos_emb: bool = False
    dropout: float = 0.0
    initializer_range: float = 0.02
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if (n_mlp := kwargs.pop("n_mlp", None)) is not None and self.d_mlp is None:
            self.d_mlp = n_mlp
        # The ecosystem's names arrive as extra keywords; set them first, so that what is derived
        # below is derived from them.
        for alias, name in self.attribute_map.items():
            if alias in kwargs:
                setattr(self, name, kwargs.pop(alias))
        if isinstance(self.afrac_loctypes, (list, tuple)):
            self.afrac_loctypes = ",".join(self.afrac_loctypes)
        self._check_types()
        self._derive_widths()
        self._validate()
        super().__post_init__(**kwargs)

    def _check_types(self) -> None:
        def field(name: str) -> Field:
            return Field(getattr(self, name), type(self).__name__, name)

        field("n_layer").integer(1, MAX_LAYERS)
        for name in ("d_model", "block_size", "vocab_size"):
            field(name).integer(1, MAX_WIDTH)
        for name in ("n_head", "d_head", "d_mlp", "d_pos_emb"):
            if getattr(self, name) is not None:
                field(name).integer(1, MAX_WIDTH)
        for name in (
            "rms_norm", "bias", "ln_bias", "tied_unembed", "sink", "enable_bigram_table",
            "learnable_bigram_table", "dropout_cat_pos_emb", "sinusoidal_cat_pos_emb",
            "use_cache",
        ):  # fmt: skip
            field(name).boolean()
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if isinstance(getattr(self, name), list) and name == "eos_token_id":
                field(name).integers(-1, MAX_WIDTH)
            elif getattr(self, name) is not None:
                field(name).integer(-1, MAX_WIDTH)
        for name in ("afrac_loctypes", "activation_type", "residual_activation_type"):
            field(name).text()
        for name in (
            "dropout",
            "initializer_range",
            *(("afrac",) if self.afrac is not None else ()),
        ):
            field(name).number()
        if not 0 <= self.dropout <= 1:
            field("dropout").fail("from 0 to 1")
        if self.initializer_range < 0:
            field("initializer_range").fail("at least 0")

    def _derive_widths(self) -> None:
        if self.d_head is None and self.n_head is None:
            self.d_head = 16
        if self.d_head is None:
            if self.d_model % self.n_head:
                raise ValueError(
                    f"d_model={self.d_model} is not a multiple of n_head={self.n_head}; choose "
                    "widths that divide, or pass d_head to set the heads' width yourself."
                )
            self.d_head = self.d_model // self.n_head
        if self.n_head is None:
            if self.d_model % self.d_head:
                raise ValueError(
                    f"d_model={self.d_model} is not a multiple of d_head={self.d_head}; choose "
                    "widths that divide, or pass n_head to set the number of heads yourself."
                )
            self.n_head = self.d_model // self.d_head
        if self.d_mlp is None:
            self.d_mlp = 4 * self.d_model
        if self.n_head * self.d_head > MAX_WIDTH:
            raise ValueError(
                f"n_head={self.n_head} heads of d_head={self.d_head} were passed, but together "
                f"they must be at most {MAX_WIDTH} wide."
            )

    def _validate(self) -> None:
        if self.activation_type not in ("gelu", "relu"):
            raise ValueError(
                f'activation_type={self.activation_type!r} is not known; use "gelu" or "relu".'
            )
        if self.residual_activation_type not in ("identity", "relu"):
            raise ValueError(
                f"residual_activation_type={self.residual_activation_type!r} is not known; "
                'use "identity" or "relu".'
            )
        unknown = set(self.activation_sites) - set(ACTIVATION_SITES)
        if unknown:
            raise ValueError(
                f"afrac_loctypes names {', '.join(sorted(unknown))}, but the sites are "
                f"{', '.join(ACTIVATION_SITES)}."
            )
        if self.afrac is not None:
            if not 0 < self.afrac <= 1:
                raise ValueError(
                    f"afrac={self.afrac} was passed, but the kept fraction must be in (0, 1]; "
                    "use None to keep every activation."
                )
            narrow = [s for s in self.activation_sites if int(self.afrac * self.site_width(s)) < 1]
            if narrow:
                raise ValueError(
                    f"afrac={self.afrac} keeps no activation at {', '.join(narrow)}, "
                    f"{self.site_width(narrow[0])} wide; use a larger afrac or a wider model."
                )
        if self.sinusoidal_cat_pos_emb and self.d_pos_emb is None:
            raise ValueError(
                "sinusoidal_cat_pos_emb=True was passed without d_pos_emb; give the width of the "
                "concatenated positions."
            )

    @property
    def activation_sites(self) -> tuple[str, ...]:
        """The sites at which AbsTopK acts, as names out of `ACTIVATION_SITES`."""
        return tuple(s for s in (p.strip() for p in self.afrac_loctypes.split(",")) if s)

    @property
    def d_model_in(self) -> int:
        """Width of a block's input: `d_model`, plus the concatenated position if there is one."""
        return self.d_model + (self.d_pos_emb or 0)

    def site_width(self, site: str) -> int:
        """Number of channels at an AbsTopK site named as in `ACTIVATION_SITES`."""
        if site in ("attn_in", "mlp_in"):
            return self.d_model_in
        if site in ("attn_q", "attn_k", "attn_v"):
            return self.n_head * self.d_head
        return self.d_mlp if site == "mlp_neuron" else self.d_model

    def site_k(self, site: str) -> int | None:
        """How many activations AbsTopK keeps at a site; `None` where it does not act."""
        if self.afrac is None or site not in self.activation_sites:
            return None
        return int(self.afrac * self.site_width(site))


__all__ = ["ACTIVATION_SITES", "CircuitGPTConfig"]
