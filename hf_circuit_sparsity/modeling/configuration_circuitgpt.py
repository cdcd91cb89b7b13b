"""Configuration of CircuitGPT, the weight-sparse GPT of Gao et al. 2025 (arXiv 2511.13653).

A config that OpenAI released is valid here; `attribute_map` adds the ecosystem's names of fields.
"""

import copy
import importlib
import os
from typing import Any, Literal

import torch
from huggingface_hub.dataclasses import strict, validated_field
from transformers import PreTrainedConfig

# Every place where AbsTopK may act, by OpenAI's name for it (Gao et al. 2025, section 2).
ACTIVATION_SITES = (
    "attn_in", "attn_q", "attn_k", "attn_v", "attn_out", "mlp_in", "mlp_neuron", "mlp_out",
    "resid_post_attn", "resid_post_mlp",
)  # fmt: skip
PAPER_ACTIVATION_SITES = ",".join(ACTIVATION_SITES[:8])

REPRODUCTION = "hf_circuit_sparsity.modeling.reproduction"  # which does not travel
MAX_LAYERS, MAX_WIDTH = 1024, 1 << 24  # far above any model; more in a file costs minutes
# What weights may be; others cannot be computed with.
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class ArtifactError(ValueError):
    """A file of an artifact does not hold what it must."""

    def __init__(self, path: str | os.PathLike, problem: str) -> None:
        self.path = os.fspath(path)
        super().__init__(f"{self.path}{problem}")


class CheckedConfig:
    """Beside `PreTrainedConfig`: a wrong file is refused by an [`ArtifactError`] that names it."""

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike) -> dict[str, Any]:
        try:
            content = super()._dict_from_json_file(json_file)
            if "model_config" in content:  # of the public reproduction
                content = importlib.import_module(REPRODUCTION).config_fields(content)
            if not isinstance(content.get("model_type", ""), str):
                raise ValueError("model_type must be a string")
            cls.from_dict(copy.deepcopy(content))
        except Exception as error:  # transformers raises all kinds on values it does not expect
            reason = str(error).removeprefix(f"{cls.__name__}: ")
            raise ArtifactError(json_file, f": {reason:.500}") from error
        return content


def within(low: float, high: float, default: Any) -> Any:
    """A field of a strict config: None, or a number (or numbers) from `low` to `high`."""

    def check(value: Any) -> None:
        for number in value if isinstance(value, list) else [value]:
            if number is not None and not low <= number <= high:  # nor NaN
                raise ValueError(f"expected {low} to {high}, got {number}")

    return validated_field(check, default=default)


@strict
class CircuitGPTConfig(CheckedConfig, PreTrainedConfig):
    """Architecture of a [`CircuitGPTForCausalLM`]. The defaults are the paper's largest model.
    Fields of a released config that are not listed here are kept as attributes.

    Args:
        n_layer (`int`): transformer blocks.
        n_head (`int`, *optional*): attention heads; `d_model // d_head` if not given.
        d_model (`int`): width of the residual stream.
        d_head (`int`, *optional*): width of one head; if not given, `d_model // n_head`, or 16 (the
            paper's) without `n_head`.
        d_mlp (`int`, *optional*): neurons per MLP; `4 * d_model` if not given. Old name: `n_mlp`.
        block_size (`int`): longest sequence, in tokens.
        vocab_size (`int`): tokens in the vocabulary.
        rms_norm (`bool`): RMSNorm (so that zero keeps its meaning) instead of LayerNorm.
        bias (`bool`): biases in the linear layers.
        ln_bias (`bool`): biases in LayerNorm; RMSNorm has none.
        activation_type (`str`): `"gelu"` or `"relu"`, the neurons' nonlinearity.
        residual_activation_type (`str`): `"identity"`, or `"relu"` after every residual addition.
        afrac (`float`, *optional*): AbsTopK keeps int(afrac * width) activations; `None`: all.
        afrac_loctypes (`str`): where AbsTopK acts, comma-separated, out of `ACTIVATION_SITES`.
        tied_unembed (`bool`): share the token embedding with the unembedding.
        sink (`bool`): a learnable logit per head that only enters the softmax denominator.
        enable_bigram_table (`bool`): a dense `V × V` table; a token's row is added to its logits.
        learnable_bigram_table (`bool`): the table is a parameter rather than a buffer.
        use_positional_embeddings (`bool`): learned positions; without, only the mask tells order.
        d_pos_emb (`int`, *optional*): width of positions that are normalised and concatenated to
            every block's input; if not given, they are added to the embedding.
        dropout_cat_pos_emb (`bool`): dropout on concatenated positions.
        sinusoidal_cat_pos_emb (`bool`): concatenated positions are frozen sinusoids.
        dropout (`float`): dropout after embedding, attention and MLP, and on attention weights.
        initializer_range (`float`): standard deviation of the initial weights.

    Raises:
        StrictDataclassFieldValidationError: a field of another type or outside its range.
        ValueError: fields that do not fit each other, such as heads that do not divide `d_model`.
        ArtifactError: any of these, in a file; names the file.
    """

    model_type = "circuitgpt"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (transformers reads it so)
    attribute_map = {  # noqa: RUF012
        "hidden_size": "d_model", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
        "head_dim": "d_head", "intermediate_size": "d_mlp",
        "max_position_embeddings": "block_size", "tie_word_embeddings": "tied_unembed",
    }  # fmt: skip

    n_layer: int = within(1, MAX_LAYERS, default=8)
    n_head: int | None = within(1, MAX_WIDTH, default=None)
    d_model: int = within(1, MAX_WIDTH, default=2048)
    d_head: int | None = within(1, MAX_WIDTH, default=None)
    d_mlp: int | None = within(1, MAX_WIDTH, default=None)
    block_size: int = within(1, MAX_WIDTH, default=256)
    vocab_size: int = within(1, MAX_WIDTH, default=2048)
    rms_norm: bool = True
    bias: bool = True
    ln_bias: bool = True
    activation_type: Literal["gelu", "relu"] = "gelu"
    residual_activation_type: Literal["identity", "relu"] = "identity"
    afrac: float | int | None = within(0, 1, default=0.25)
    afrac_loctypes: str | list[str] | tuple[str, ...] = PAPER_ACTIVATION_SITES
    tied_unembed: bool = False
    sink: bool = True
    enable_bigram_table: bool = True
    learnable_bigram_table: bool = True
    use_positional_embeddings: bool = True
    d_pos_emb: int | None = within(1, MAX_WIDTH, default=None)
    dropout_cat_pos_emb: bool = False
    sinusoidal_cat_pos_emb: bool = False
    dropout: float | int = within(0, 1, default=0.0)
    initializer_range: float | int = within(0, 1e6, default=0.02)
    use_cache: bool = True
    bos_token_id: int | None = within(-1, MAX_WIDTH, default=None)
    eos_token_id: int | list[int] | None = within(-1, MAX_WIDTH, default=None)
    pad_token_id: int | None = within(-1, MAX_WIDTH, default=None)

    def __post_init__(self, **kwargs: Any) -> None:
        if (n_mlp := kwargs.pop("n_mlp", None)) is not None and self.d_mlp is None:
            self.d_mlp = n_mlp
        # The ecosystem's names arrive as extra keywords; the fields below are derived from them.
        for alias in self.attribute_map.keys() & kwargs.keys():
            setattr(self, alias, kwargs.pop(alias))
        if isinstance(self.afrac_loctypes, (list, tuple)):
            self.afrac_loctypes = ",".join(self.afrac_loctypes)
        if self.d_head is None and self.n_head is None:
            self.d_head = 16
        for name, other in (("d_head", "n_head"), ("n_head", "d_head")):
            if getattr(self, name) is None:
                divisor = getattr(self, other)
                if self.d_model % divisor:
                    widths = f"d_model={self.d_model} is not a multiple of {other}={divisor}"
                    raise ValueError(f"{widths}; choose widths that divide, or pass {name} too.")
                setattr(self, name, self.d_model // divisor)
        if self.d_mlp is None:
            self.d_mlp = 4 * self.d_model
        if self.n_head * self.d_head > MAX_WIDTH:
            heads = f"n_head={self.n_head} heads of d_head={self.d_head}"
            raise ValueError(f"{heads} were passed, expected at most {MAX_WIDTH} wide together.")
        if unknown := set(self.activation_sites) - set(ACTIVATION_SITES):
            names, known = ", ".join(sorted(unknown)), ", ".join(ACTIVATION_SITES)
            raise ValueError(f"afrac_loctypes names {names}, expected sites out of {known}.")
        if narrow := [site for site in self.activation_sites if self.site_k(site) == 0]:
            sites = f"{', '.join(narrow)}, {self.site_width(narrow[0])} wide"
            raise ValueError(f"afrac={self.afrac} keeps no activation at {sites}; raise either.")
        joined = self.d_pos_emb is not None
        if self.sinusoidal_cat_pos_emb > joined or joined > self.use_positional_embeddings:
            needs = "d_pos_emb, and d_pos_emb needs use_positional_embeddings"
            raise ValueError(f"sinusoidal_cat_pos_emb needs {needs}; pass what is missing.")
        super().__post_init__(**kwargs)
        if self.dtype not in (None, *FLOAT_DTYPES):
            raise ValueError(f"dtype={self.dtype} was passed, expected a float of 16 to 64 bits.")

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
        if (afrac := self.afrac) is None or site not in self.activation_sites:
            return None
        return int(afrac * self.site_width(site))
