"""The settings of :class:`SparseTrainer`: what it adds to ``TrainingArguments``, and its recipe."""

from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from ..optim.rcd.blocks import BlockKind, Selection
from ..optim.rcd.config import check_schedule, check_settings
from ..optim.schedules import DensitySchedule
from ..optim.sparse_init import SUPPORTS
from ..optim.topk_adamw import GRAD_RMS_MODES

Sparsifier = Literal["topk", "rcd", "none"]
SPARSIFIERS: tuple[str, ...] = get_args(Sparsifier)


@dataclass
class SparseTrainingArguments(TrainingArguments):
    """Arguments of :class:`SparseTrainer`; everything else is as in ``TrainingArguments``.

    The defaults are the recipe of Gao et al. 2025, section 2, with gradients always normalized, as
    the reproductions that match the authors' runs do. Values given explicitly win. Works with
    ``HfArgumentParser``.

    Raises:
        ValueError: if a value is unknown or out of range.
    """

    # --- How the weights become sparse ---
    sparsifier: Sparsifier = field(
        default="topk",
        metadata={
            "help": "What makes the weights sparse: 'topk' keeps the largest weights after every "
            "AdamW step, 'rcd' starts sparse and stays so by random coordinate descent (its "
            "settings begin with rcd_; anneal_start does not apply), 'none' trains a dense model "
            "by the same recipe, for comparison."
        },
    )
    target_density: float = field(
        default=1 / 64,
        metadata={
            "help": "Share of each sparse matrix that is nonzero at the end, in (0, 1]; the "
            "default is 1/64."
        },
    )
    anneal_start: float = field(
        default=0.01,
        metadata={"help": "Where the density leaves 1, as a fraction of the training steps."},
    )
    anneal_end: float = field(
        default=0.5,
        metadata={"help": "Where the density reaches its target, as a fraction of the steps."},
    )
    min_nonzeros: int = field(
        default=4,
        metadata={
            "help": "Nonzeros that each neuron or attention channel keeps in any case; 0 for no "
            "such minimum."
        },
    )

    # --- Random coordinate descent (sparsifier="rcd"): see RCDSparseOptimizer ---
    rcd_selection: Selection = field(
        default="uniform",
        metadata={
            "help": "How blocks of coordinates are drawn: 'uniform', 'magnitude' (of the weights "
            "in them), 'gradient' (uniform, but only the zeros with the largest gradients move) or "
            "'cyclic'."
        },
    )
    rcd_block: BlockKind = field(
        default="rows",
        metadata={"help": "What a block is made of: 'rows' (outputs), 'columns' or 'entries'."},
    )
    rcd_block_fraction: float = field(
        default=1 / 16,
        metadata={"help": "Share of each sparse parameter in a block, in (0, 1]."},
    )
    rcd_block_steps: int = field(
        default=1, metadata={"help": "Optimizer steps for which a block stays."}
    )
    rcd_update: Literal["adam", "plain"] = field(
        default="adam", metadata={"help": "Whether steps are Adam's or plain gradient steps."}
    )
    rcd_start: Literal["random", "magnitude"] = field(
        default="random",
        metadata={
            "help": "How a model that is denser than target_density is thinned out first: 'random' "
            "suits a fresh one, 'magnitude' (keep the largest) a trained one."
        },
    )
    rcd_clip_threshold: float = field(
        default=0.0, metadata={"help": "Weights smaller than this in magnitude become zero."}
    )
    rcd_l1: float = field(
        default=0.0, metadata={"help": "Weight of an L1 penalty, applied by soft thresholding."}
    )
    rcd_magnitude_power: float = field(
        default=1.0, metadata={"help": "Exponent of the weights in rcd_selection='magnitude'."}
    )
    rcd_magnitude_floor: float = field(
        default=0.1,
        metadata={"help": "Share of rcd_selection='magnitude' that is spread evenly, in (0, 1]."},
    )
    rcd_greedy_fraction: float = field(
        default=1 / 16,
        metadata={"help": "Share of a block's zeros that rcd_selection='gradient' moves."},
    )

    rcd_start_density: float | None = field(
        default=None,
        metadata={
            "help": "Share of nonzeros to start with, from target_density to 1; it falls by equal "
            "factors until anneal_end. Not given: target_density from the first step."
        },
    )
    rcd_explore_end: float = field(
        default=1.0,
        metadata={
            "help": "From when on no zeros are looked at any more, as a fraction of the steps."
        },
    )

    rcd_staleness: int = field(
        default=0,
        metadata={
            "help": "Use gradients so many steps after they were computed, so that several "
            "processes need not wait for each other."
        },
    )

    # --- Which parameters are sparse ---
    sparse_embeddings: bool = field(
        default=True, metadata={"help": "Whether embeddings and the unembedding are sparse."}
    )
    sparse_biases: bool = field(
        default=True, metadata={"help": "Whether the biases of linear layers are sparse."}
    )
    exclude_parameters: list[str] | None = field(
        default=None,
        metadata={
            "help": "Shell-style patterns of full parameter names to keep dense, for example "
            "'*.mlp.*'."
        },
    )
    include_parameters: list[str] | None = field(
        default=None,
        metadata={
            "help": "Shell-style patterns of full parameter names to make sparse although they are "
            "not weights or biases of linear layers or embeddings."
        },
    )

    # --- How it is computed ---
    compute_on_nonzeros: bool = field(
        default=True,
        metadata={
            "help": "Whether linear layers multiply only their nonzeros, forward and for the "
            "gradient of their input, once they are sparse enough for that to be faster (CPU, "
            "float32). The results are the same to rounding."
        },
    )

    # --- How the optimizer compensates ---
    grad_rms: Literal["always", "clip", "off"] = field(
        default="always",
        metadata={
            "help": "Bring the root-mean-square of the gradients to 1 before each step: 'always', "
            "'clip' (only where it is above 1) or 'off'."
        },
    )
    sharkfin: bool = field(
        default=True,
        metadata={"help": "Whether to multiply the learning rate by 1/sqrt(density)."},
    )

    # --- Other defaults than in TrainingArguments ---
    learning_rate: float = field(
        default=1e-2,
        metadata={"help": "Peak learning rate, before the factor 1/sqrt(density)."},
    )
    warmup_steps: float = field(
        default=0.01,
        metadata={"help": "Steps of linear warm-up; below 1, a fraction of the training steps."},
    )
    weight_decay: float = field(
        default=0.1, metadata={"help": "Decoupled weight decay of matrices; vectors have none."}
    )
    adam_beta2: float = field(
        default=0.95, metadata={"help": "Decay rate of the second moment in AdamW."}
    )
    adam_epsilon: float = field(
        default=0.1,
        metadata={"help": "Epsilon of AdamW. Large because gradients have root-mean-square 1."},
    )
    max_grad_norm: float = field(
        default=0.0,
        metadata={
            "help": "Maximum gradient norm for clipping; 0 for none, as the optimizer normalizes "
            "the gradients itself (see grad_rms)."
        },
    )

    def __post_init__(self) -> None:
        if self.sparsifier not in SPARSIFIERS:
            raise ValueError(
                f"sparsifier={self.sparsifier!r} is unknown: expected one of "
                f"{', '.join(SPARSIFIERS)}."
            )
        if self.grad_rms not in GRAD_RMS_MODES:
            raise ValueError(
                f"normalize_gradients={self.grad_rms!r} is unknown: expected one of "
                f"{', '.join(GRAD_RMS_MODES)}."
            )
        DensitySchedule(self.target_density, self.anneal_start, self.anneal_end)  # checks them
        minimum = self.min_nonzeros
        if isinstance(minimum, bool) or not isinstance(minimum, int) or minimum < 0:
            raise ValueError(f"min_nonzeros={minimum!r} is not a whole number >= 0.")
        for name in ("exclude_parameters", "include_parameters"):
            if isinstance(getattr(self, name), str):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is one string: pass a list of patterns."
                )
        check_settings(self.rcd_settings(), prefix="rcd_")
        check_schedule(
            self.target_density, self.rcd_start_density, self.anneal_end, self.rcd_explore_end, 1,
            prefix="rcd_",
        )  # fmt: skip
        if isinstance(self.rcd_staleness, bool) or self.rcd_staleness < 0:
            raise ValueError(f"rcd_staleness={self.rcd_staleness!r} is not a number of steps >= 0.")
        if self.rcd_start not in SUPPORTS:
            raise ValueError(
                f"rcd_start={self.rcd_start!r} is unknown: expected one of {', '.join(SUPPORTS)}."
            )
        super().__post_init__()
        if self.sparsifier == "rcd":
            self._check_rcd()
        if self.optim not in (OptimizerNames.ADAMW_TORCH, OptimizerNames.ADAMW_TORCH_FUSED):
            raise ValueError(
                f"optim={self.optim.value!r} has no effect: SparseTrainer builds the optimizer "
                "itself; leave optim out, or hand SparseTrainer an optimizer with `optimizers=`."
            )

    def rcd_settings(self) -> dict[str, Any]:
        """The ``rcd_`` settings as :class:`RCDSparseOptimizer` takes them."""
        names = [f.name for f in fields(self) if f.name.startswith("rcd_")]
        for elsewhere in ("rcd_start", "rcd_start_density", "rcd_explore_end", "rcd_staleness"):
            names.remove(elsewhere)
        return {name.removeprefix("rcd_"): getattr(self, name) for name in names}

    def _check_rcd(self) -> None:
        if self.fp16:
            raise ValueError(
                "fp16=True scales full gradients only, and sparsifier='rcd' computes partial ones: "
                "use bf16=True."
            )
        if self.max_grad_norm:
            raise ValueError(
                f"max_grad_norm={self.max_grad_norm} clips full gradients only, and "
                "sparsifier='rcd' computes partial ones: leave it at 0, grad_rms does the like."
            )
        if self.torch_compile:
            raise ValueError(
                "torch_compile=True cannot trace the partial gradients of sparsifier='rcd': leave "
                "it out."
            )
