"""The settings of [`SparseTrainer`]."""

import json
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from ..docstrings import documented
from ..optim.rcd.config import RCDConfig
from ..optim.schedules import check_linear_density
from ..optim.settings import check, is_fraction
from ..optim.sparse_optimizer import NORMALIZATIONS, Normalization

Sparsifier = Literal["topk", "rcd", "none"]
SPARSIFIERS: tuple[str, ...] = get_args(Sparsifier)


def with_help(cls: type) -> type:
    """Give the fields of a dataclass, as help on a command line, what its docstring says."""
    for name, text in documented(cls.__doc__ or "").items():
        cls.__dataclass_fields__[name].metadata = {"help": text.replace("%", "%%")}
    return cls


@with_help
@dataclass
class SparseTrainingArguments(TrainingArguments):
    """Arguments of [`SparseTrainer`]: those of `TrainingArguments`, and what is listed here.

    The defaults are the recipe of Gao et al. 2025, section 2, with gradients always normalized, as
    in the reproductions that match the authors' runs. Works with `HfArgumentParser`.

    > How the weights become sparse

    Args:
        sparsifier (`str`, defaults to `"topk"`): `"topk"` keeps the largest weights after every
            AdamW step; `"rcd"` starts sparse and stays so by random coordinate descent; `"none"`
            trains a dense model by the same recipe, for comparison.
        target_density (`float`, defaults to 1/64): share of each sparse matrix that is nonzero at
            the end, in (0, 1].
        anneal_start (`float`, defaults to 0.01): fraction of the steps after which the density
            falls from 1; without effect with `"rcd"`.
        anneal_end (`float`, defaults to 0.5): fraction of the steps after which the density is at
            its target.
        min_nonzeros (`int`, defaults to 4): nonzeros that each neuron or attention channel keeps.
        rcd_config ([`RCDConfig`], `dict` or `str`): settings of `"rcd"`; a dict of the fields of
            `RCDConfig`, also as JSON, for example `{"block_fraction": 0.25}`.

    > Which parameters are sparse

    Args:
        sparse_embeddings (`bool`, defaults to `True`): whether embeddings and the unembedding are
            sparse.
        sparse_biases (`bool`, defaults to `True`): whether biases of linear layers are sparse.
        exclude_parameters (`list[str]`): shell-style patterns of full names of parameters to keep
            dense, for example `*.mlp.*`.
        include_parameters (`list[str]`): shell-style patterns of full names of parameters to make
            sparse although they belong to no linear layer or embedding.

    > Where a pretrained model becomes sparse

    Args:
        distillation_weight (`float`, defaults to 0): share of the training loss, in [0, 1], that is
            the KL divergence from the predictions of the model as it was before the first step;
            the rest is cross-entropy.

    > How it is computed

    Args:
        compute_on_nonzeros (`bool`, defaults to `True`): linear layers multiply only nonzeros once
            that is faster (CPU, float32). Results are equal to rounding.
        compact_activations (`bool`, defaults to `False`): keep for the backward pass only the
            nonzeros of activations that are mostly zero, as AbsTopK leaves them. Less memory for a
            little more time; not with FSDP or `torch_compile`.
        normalize_gradients (`str`, defaults to `"always"`): bring the root-mean-square of the
            gradients to 1 before each step: `"always"`, `"clip"` (where it is above 1) or `"off"`.
        sharkfin (`bool`, defaults to `True`): multiply the learning rate by 1/sqrt(density).

    > Defaults that differ from `TrainingArguments`

    Args:
        learning_rate (`float`, defaults to 1e-2): peak learning rate, before the sharkfin factor.
        warmup_steps (`float`, defaults to 0.01): of warm-up; below 1 a fraction of the steps.
        weight_decay (`float`, defaults to 0.1): decoupled, of matrices; vectors have none.
        adam_beta2 (`float`, defaults to 0.95): decay rate of the second moment.
        adam_epsilon (`float`, defaults to 0.1): large, as gradients have root-mean-square 1.
        max_grad_norm (`float`, defaults to 0): above which to clip; 0 for no clipping.

    Raises:
        ValueError: a value is unknown or out of range.
    """

    sparsifier: Sparsifier = "topk"
    target_density: float = 1 / 64
    anneal_start: float = 0.01
    anneal_end: float = 0.5
    min_nonzeros: int = 4
    # The annotation begins with types that HfArgumentParser can read from a command line.
    rcd_config: RCDConfig | str | dict | None = None

    sparse_embeddings: bool = True
    sparse_biases: bool = True
    exclude_parameters: list[str] | None = None
    include_parameters: list[str] | None = None

    distillation_weight: float = 0.0

    compute_on_nonzeros: bool = True
    compact_activations: bool = False
    normalize_gradients: Normalization = "always"
    sharkfin: bool = True

    learning_rate: float = 1e-2
    warmup_steps: float = 0.01
    weight_decay: float = 0.1
    adam_beta2: float = 0.95
    adam_epsilon: float = 0.1
    max_grad_norm: float = 0.0

    def __post_init__(self) -> None:
        if self.sparsifier not in SPARSIFIERS:
            raise ValueError(
                f"sparsifier={self.sparsifier!r} is unknown: expected one of "
                f"{', '.join(SPARSIFIERS)}."
            )
        if self.normalize_gradients not in NORMALIZATIONS:
            raise ValueError(
                f"normalize_gradients={self.normalize_gradients!r} is unknown: expected one of "
                f"{', '.join(NORMALIZATIONS)}."
            )
        check_linear_density(self.target_density, self.anneal_start, self.anneal_end, 1)
        weight = self.distillation_weight
        check("distillation_weight", weight, is_fraction(weight), "a share in [0, 1]")
        minimum = self.min_nonzeros
        if isinstance(minimum, bool) or not isinstance(minimum, int) or minimum < 0:
            raise ValueError(f"min_nonzeros={minimum!r} is not a whole number >= 0.")
        if self.compact_activations and (self.torch_compile or self.fsdp):
            other = "torch_compile" if self.torch_compile else "fsdp"
            raise ValueError(
                f"compact_activations=True was passed with {other}={getattr(self, other)!r}, which "
                "keeps activations its own way; leave one of them out."
            )
        for name in ("exclude_parameters", "include_parameters"):
            if isinstance(getattr(self, name), str):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is one string: pass a list of patterns."
                )
        self.rcd_config = _as_rcd_config(self.rcd_config)
        self.rcd_config.check_run(self.target_density, self.anneal_end, 1)
        if self.greater_is_better is None and self._less_is_better():
            self.greater_is_better = False
        super().__post_init__()
        if self.sparsifier == "rcd":
            self._check_rcd()
        if self.optim not in (OptimizerNames.ADAMW_TORCH, OptimizerNames.ADAMW_TORCH_FUSED):
            raise ValueError(
                f"optim={self.optim.value!r} has no effect: SparseTrainer builds the optimizer "
                "itself; leave optim out, or hand SparseTrainer an optimizer with `optimizers=`."
            )

    def to_dict(self) -> dict[str, Any]:
        """All values as plain types; see `TrainingArguments`."""
        return {**super().to_dict(), "rcd_config": asdict(self.rcd_config)}

    def _less_is_better(self) -> bool:
        """Whether `metric_for_best_model` is better when smaller though no "loss" says so."""
        return (self.metric_for_best_model or "").endswith("perplexity")

    def _check_rcd(self) -> None:
        if self.fp16:
            raise ValueError(
                "fp16=True scales full gradients only, and sparsifier='rcd' computes partial ones: "
                "use bf16=True."
            )
        if self.max_grad_norm:
            raise ValueError(
                f"max_grad_norm={self.max_grad_norm} clips full gradients only, and "
                "sparsifier='rcd' computes partial ones: leave it at 0; "
                "normalize_gradients already does that."
            )
        if self.torch_compile:
            raise ValueError(
                "torch_compile=True cannot trace the partial gradients of sparsifier='rcd': leave "
                "it out."
            )


def _as_rcd_config(value: RCDConfig | str | dict[str, Any] | None) -> RCDConfig:
    """Read `rcd_config` in any of its forms."""
    if isinstance(value, RCDConfig):
        return value
    try:
        settings = json.loads(value) if isinstance(value, str) else value or {}
        return RCDConfig(**settings)
    except (TypeError, ValueError) as error:  # no JSON, no dict, or a setting that is not known
        raise ValueError(
            f"rcd_config={value!r} is not an RCDConfig, nor a dict of its fields or the JSON of "
            f"one: {error}"
        ) from error
