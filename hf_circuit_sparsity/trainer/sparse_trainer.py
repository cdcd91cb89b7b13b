"""The Hugging Face `Trainer` for weight-sparse models."""

import logging
from collections.abc import Callable
from contextlib import ExitStack
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Dataset, IterableDataset
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerState,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import EvalPrediction, TrainOutput

from ..hub_cards.card import MARK
from ..modeling.sparse_layers import sparse_layers
from ..optim.param_groups import sparse_param_groups
from ..optim.rcd.distributed import RCDProcessGroup, leave_to_process_group
from ..optim.rcd.optimizer import RCDSparseOptimizer
from ..optim.rcd.partial_gradients import PartialGradients
from ..optim.saved_activations import compact_activations
from ..optim.sharding import check_ranks_agree
from ..optim.sparse_compute import MAX_DENSITY, on_nonzeros
from ..optim.sparse_init import sparsify_initialization_
from ..optim.sparse_optimizer import SparseOptimizer
from ..optim.topk_adamw import TopKAdamW
from .callbacks import SparsityMonitor
from .distillation import as_teacher, kl_to_teacher
from .model_card import model_card, numbers_of_run
from .nonzero_checkpoints import NonzeroCheckpointTrainer
from .sparse_config import SparseTrainingArguments

logger = logging.getLogger(__name__)


class SparseTrainer(NonzeroCheckpointTrainer):
    """`Trainer` whose optimizer keeps the weights sparse.

    Trains any model with `nn.Linear`, `Conv1D` or `nn.Embedding` layers. The optimizer's own step
    makes the weights sparse, so gradient accumulation, mixed precision, DDP, FSDP2 and resuming
    work as in `Trainer`. A run that is not stopped early ends at the target density.

    [`TopKAdamW`] describes the default recipe, [`RCDSparseOptimizer`] that of `sparsifier="rcd"`.
    With the latter the model is thinned out before the first step ([`sparsify_initialization_`]),
    and no full gradient of a sparse matrix is computed ([`PartialGradients`]). With DDP each
    process computes and sends the gradients of its own coordinates only. A model of
    [`sparse_from_config`], or one after `to_sparse()`, then trains its nonzeros alone, and
    checkpoints hold nothing else.

    The training logs get:

    - `density`: as scheduled,
    - `nonzeros`, `nonzero_fraction` and `mask_churn`: see [`SparsityMonitor`],
    - `grad_rms`: root-mean-square of the gradients before normalization,
    - `effective_lr`: the learning rate with the sharkfin factor,
    - `block_number`, with "rcd": blocks drawn so far; `skipped_steps`, once there are some.

    The log of an evaluation gets `eval_perplexity`, unless labels are smoothed; what `evaluate`
    returns has it only for `metric_for_best_model="perplexity"`. The best model is looked for only
    at the target density, since the densest would be the best before.

    With `distillation_weight` a pretrained model also learns to predict what it predicted when it
    was dense; losses of evaluations are without that. To resume, hand over the dense one again.

    Args:
        model: the model to train, if there is no `model_init`.
        args: its settings; those of the recipe if not given.
        optimizers: as in `Trainer`; an optimizer given here is used as it is.
        data_collator, train_dataset, eval_dataset, processing_class, model_init: as in `Trainer`.
        compute_loss_func, compute_metrics, callbacks, optimizer_cls_and_kwargs: as in `Trainer`.
        preprocess_logits_for_metrics: as in `Trainer`.
        teacher: for `distillation_weight`, where it is not a copy of `model` as handed over; of
            the same vocabulary.

    Raises:
        TypeError: `args` is no [`SparseTrainingArguments`].
        ValueError: the model has nothing to make sparse, or training is sharded otherwise than by
            FSDP2 (by DeepSpeed, with parameters offloaded, or at all with "rcd").
    """

    args: SparseTrainingArguments

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | None = None,
        args: SparseTrainingArguments | None = None,
        data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        model_init: Callable[..., PreTrainedModel] | None = None,
        compute_loss_func: Callable[..., torch.Tensor] | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Optimizer | None, LRScheduler | None] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[..., torch.Tensor] | None = None,
        teacher: PreTrainedModel | None = None,
    ) -> None:
        args = SparseTrainingArguments() if args is None else args
        if not isinstance(args, SparseTrainingArguments):
            raise TypeError(
                f"args is a {type(args).__name__}, expected SparseTrainingArguments: build that "
                "with the same values, or use transformers.Trainer."
            )
        if isinstance(model, nn.Module):
            # Says what is wrong before a folder is made for the run.
            sparse_param_groups(model, **_group_settings(args))
        if teacher is not None and not args.distillation_weight:
            raise ValueError("a teacher was passed, but distillation_weight=0: set it above 0.")
        self._has_own_teacher = teacher is not None
        self.teacher = None if teacher is None else teacher.requires_grad_(False).eval()
        self._copy_teacher(model, args)
        # Set before Trainer's own __init__, which may already log or build the optimizer.
        self._built: TopKAdamW | RCDSparseOptimizer | None = None
        self._partial: PartialGradients | None = None
        self._monitor: SparsityMonitor | None = None
        self._planned_steps = 0
        self._training: ExitStack | None = None
        super().__init__(
            model, args, data_collator=data_collator, train_dataset=train_dataset,
            eval_dataset=eval_dataset, processing_class=processing_class, model_init=model_init,
            compute_loss_func=compute_loss_func, compute_metrics=compute_metrics,
            callbacks=callbacks, optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )  # fmt: skip
        if args.sparsifier == "rcd" and args.n_gpu > 1:
            raise ValueError(
                f"sparsifier='rcd' was started in one process that sees {args.n_gpu} devices, "
                "expected one process per device: start it with `accelerate launch`."
            )

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train as `Trainer` does, computing on the nonzeros once that is faster."""
        try:
            with ExitStack() as self._training:
                self._enter_computing(self.model)
                return super().train(*args, **kwargs)
        finally:
            self._training = None
            if self._partial is not None:
                self._partial.close()
                self._partial = None

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """A new model, which `train` makes if there is a `model_init`; see `Trainer`."""
        model = super().call_model_init(trial)
        self._copy_teacher(model, self.args)
        if self._training is not None:
            self._enter_computing(model)
        return model

    def _copy_teacher(self, model: nn.Module | None, args: SparseTrainingArguments) -> None:
        if args.distillation_weight and isinstance(model, nn.Module) and not self._has_own_teacher:
            self.teacher = as_teacher(model)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """As `Trainer`'s; in training, `distillation_weight` of it is the KL to the teacher."""
        weight = self.args.distillation_weight if model.training else 0.0
        labels = inputs.get("labels")  # which Trainer may take out
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if weight:
            # Accelerate puts autocast around the forward of what it prepared, and of that alone.
            with torch.no_grad(), self.accelerator.autocast():
                taught = {k: v for k, v in inputs.items() if k not in ("labels", "use_cache")}
                logits = self.teacher.to(labels.device)(**taught, use_cache=False).logits
            # As Trainer does it for models that are told what to divide by.
            counts = num_items_in_batch if self.model_accepts_loss_kwargs else None
            kl = kl_to_teacher(outputs["logits"], logits, labels, counts)
            if counts is not None and self.args.average_tokens_across_devices:
                kl = kl * (self.args.n_gpu if self.args.n_gpu > 1 else self.args.world_size)
            loss = (1 - weight) * loss + weight * kl
        return (loss, outputs) if return_outputs else loss

    def _enter_computing(self, model: nn.Module | None) -> None:
        """Compute, and keep activations, as the settings say until training ends."""
        # Partial gradients bring their own way of doing so; on other devices and in compiled code
        # it would only have every layer traced anew.
        wanted = self.args.compute_on_nonzeros and self.args.sparsifier != "rcd"
        wanted = wanted and self.args.device.type == "cpu" and not self.args.torch_compile
        # With FSDP weights are whole for a layer's moment alone.
        wanted = wanted and not self.is_fsdp_enabled
        if not isinstance(model, nn.Module):
            return
        if wanted:
            self._training.enter_context(on_nonzeros(model))
        if self.args.compact_activations:
            if self.is_fsdp_enabled:  # by Accelerate's own config
                raise ValueError(
                    "compact_activations=True was passed, but training is sharded by FSDP, which "
                    "keeps activations its own way; leave one of them out."
                )
            self._training.enter_context(compact_activations(model))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Build the optimizer unless there is one already; see `Trainer`."""
        opt_model = self.model if model is None else model
        if self.optimizer is None and self.optimizer_cls_and_kwargs is None:
            build = self._build_rcd if self.args.sparsifier == "rcd" else self._build_topk
            self.optimizer = self._built = build(opt_model)
            self._monitor = None
        elif isinstance(self._built, TopKAdamW) and self._built.steps_taken == 0:
            # With auto_find_batch_size a smaller batch is tried, and the number of steps changes.
            for group in self._built.param_groups:
                group["total_steps"] = self._training_steps()
        if self._monitor is None and not self.is_fsdp_enabled:
            self._monitor = self._new_monitor(opt_model)
        if isinstance(self._built, RCDSparseOptimizer) and self._partial is None:
            self._partial = PartialGradients(
                opt_model,
                self._built,
                threshold=MAX_DENSITY if self.args.compute_on_nonzeros else 0.0,
                # Their full gradients were asked for by name.
                exclude_parameters=self.args.include_parameters or (),
            )
        return super().create_optimizer(model)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> tuple[nn.Module, Any]:
        prepared = super()._prepare_for_training(*args, **kwargs)
        if self._monitor is None:  # FSDP has only now made the parameters that are trained
            self._monitor = self._new_monitor(self.model)
        if isinstance(self._inner_optimizer, TopKAdamW) and self.args.world_size > 1:
            settings = self._inner_optimizer.shared_settings()
            check_ranks_agree(settings, None, self.args.device)
        return prepared

    def create_optimizer_and_scheduler(self, num_training_steps: int) -> None:
        """Build both for `num_training_steps`; see `Trainer`."""
        self._planned_steps = num_training_steps
        super().create_optimizer_and_scheduler(num_training_steps)

    def _recipe(self) -> dict[str, Any]:
        """The settings that both optimizers take."""
        args = self.args
        return {
            "lr": args.learning_rate,
            "betas": (args.adam_beta1, args.adam_beta2),
            "eps": args.adam_epsilon,
            # "none" is the same recipe with nothing projected, so that a dense model can be
            # compared with the sparse one.
            "target_density": 1.0 if args.sparsifier == "none" else args.target_density,
            "total_steps": self._training_steps(),
            "anneal_end": args.anneal_end,
            "sharkfin": args.sharkfin,
            "normalize_gradients": args.normalize_gradients,
        }

    def _build_topk(self, model: nn.Module) -> TopKAdamW:
        groups = self._param_groups(model)
        return TopKAdamW(groups, anneal_start=self.args.anneal_start, **self._recipe())

    def _build_rcd(self, model: nn.Module) -> RCDSparseOptimizer:
        args = self.args
        # A checkpoint, which is sparse already, goes through unchanged.
        sparsify_initialization_(
            model, args.rcd_config.start_density or args.target_density,
            support=args.rcd_config.init, rescale=args.rcd_config.init == "random", seed=args.seed,
            **_group_settings(args),
        )  # fmt: skip
        groups = self._param_groups(model)
        process_group = None
        if args.world_size > 1:
            process_group = RCDProcessGroup()
            sparse = {name for g in groups if g["sparse"] for name, _ in g["params"]}
            leave_to_process_group(model, sparse)
        return RCDSparseOptimizer(
            groups, config=args.rcd_config, seed=args.seed, process_group=process_group,
            **self._recipe(),
        )  # fmt: skip

    def _param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        args = self.args
        return sparse_param_groups(model, weight_decay=args.weight_decay, **_group_settings(args))

    def _new_monitor(self, model: nn.Module) -> SparsityMonitor:
        groups = [g for g in self._param_groups(model) if g["sparse"]]
        owners = {id(layer.values): layer for layer in sparse_layers(model).values()}
        return SparsityMonitor(owners.get(id(p), p) for g in groups for _, p in g["params"])

    def count_nonzeros(self) -> dict[str, float]:
        """`nonzeros` and `nonzero_fraction` of the sparse weights as they are now."""
        counts = self._new_monitor(self.accelerator.unwrap_model(self.model)).measure()
        return {name: counts[name] for name in ("nonzeros", "nonzero_fraction")}

    def _training_steps(self) -> int:
        # Trainer has counted them by the time it builds the optimizer for train().
        steps = self.state.max_steps or self._planned_steps or self.args.max_steps
        if steps <= 0:
            steps = self.set_initial_training_values(self.args, self.get_train_dataloader())[-1]
        return steps

    @property
    def _inner_optimizer(self) -> Optimizer | None:
        """The optimizer inside Accelerate's wrapper."""
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log; training logs get the sparsity figures (here, so that every tracker sees them)."""
        if "loss" in logs and self._monitor is not None:
            logs.update(self._monitor.measure())
            inner = self._inner_optimizer
            if isinstance(inner, RCDSparseOptimizer):
                logs.pop("grad_norm", None)  # of the parameters that have a full gradient only
            for name in ("density", "grad_rms", "effective_lr", "block_number", "skipped_steps"):
                value = getattr(inner, name, None)
                if value is not None and (name != "skipped_steps" or value):
                    logs[name] = value
        super().log(logs, start_time)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write `README.md`; see `Trainer`. A CircuitGPT's has the numbers of this run."""
        readme = Path(self.args.output_dir) / "README.md"
        existing = readme.read_text(encoding="utf-8") if readme.is_file() else MARK
        if MARK not in existing and "generated_from_trainer" not in existing:
            return  # a person's own
        given = signature(super().create_model_card).bind(*args, **kwargs).arguments
        name, tags = given.get("model_name"), given.get("tags") or []
        card = self._card(
            repo_id=self.hub_model_id or name or Path(self.args.output_dir).name,
            base_model=given.get("finetuned_from"),
            tags=[tags] if isinstance(tags, str) else tags,
            **({"license": given["license"]} if given.get("license") else {}),
        )
        if card is None:
            super().create_model_card(*args, **kwargs)
        elif self.is_world_process_zero():
            card.save(readme)

    def _card(self, **fields: Any) -> ModelCard | None:
        """The card of the model, or None for that of transformers."""
        model = self.accelerator.unwrap_model(self.model)
        if getattr(model.config, "model_type", None) != "circuitgpt":
            return None
        summary = {
            **numbers_of_run(self.state),
            "density": self.count_nonzeros()["nonzero_fraction"],
        }
        has_tokenizer = self.processing_class is not None
        return model_card(model, summary=summary, tokenizer=has_tokenizer, mark=True, **fields)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        inner = self._inner_optimizer
        is_annealed = isinstance(inner, TopKAdamW)
        if is_annealed and inner.density > inner.param_groups[0]["target_density"]:
            return False
        return super()._determine_best_metric(metrics, trial)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        inner, asked = self._inner_optimizer, {}
        if isinstance(inner, TopKAdamW):
            names = ("target_density", "total_steps", "anneal_start", "anneal_end")
            asked = {name: inner.param_groups[0][name] for name in names}
        super()._load_optimizer_and_scheduler(checkpoint)
        for name, value in asked.items():
            stored = inner.param_groups[0][name]
            if stored != value:
                logger.warning(
                    f"The checkpoint was trained with {name}={stored}, this run asks for {value}: "
                    "the checkpoint's density schedule is continued."
                )
        path = Path(checkpoint or "") / TRAINER_STATE_NAME
        if isinstance(inner, SparseOptimizer) and not inner.steps_taken and path.is_file():
            inner.steps_taken = TrainerState.load_from_json(str(path)).global_step
            logger.warning(
                f"{checkpoint} holds no state of the optimizer: moments and learning-rate schedule "
                f"begin anew, the density schedule goes on from step {inner.steps_taken}."
            )


def _group_settings(args: SparseTrainingArguments) -> dict[str, Any]:
    return {
        "sparse_embeddings": args.sparse_embeddings,
        "sparse_biases": args.sparse_biases,
        "min_nonzeros": args.min_nonzeros,
        "exclude_parameters": args.exclude_parameters or (),
        "include_parameters": args.include_parameters or (),
    }
