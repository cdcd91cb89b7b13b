"""The Hugging Face `Trainer` for a sparse model and its bridges to a dense one."""

import random
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput

from ..trainer.sparse_trainer import SparseTrainer
from .bridge_config import BRIDGE_PARAMETERS, BridgeTrainingArguments
from .card import bridge_card
from .checkpoint import WEIGHTS_NAME, load_adapter_weights
from .initialization import standardize_bridges_
from .losses import BY_LOCATION, LOSS_TERMS, BridgeOutput
from .modeling_bridge import BridgedCausalLM


class BridgeTrainer(SparseTrainer):
    """Trains a sparse model beside a frozen dense one, and the bridges between the two.

    The sparse model becomes sparse as with [`SparseTrainer`] (top-k or random coordinate descent).
    The bridges stay dense, and their learning rate has no sharkfin factor, unless `sparse_bridges`.

    The locations of a step's hybrid runs follow from the seed and the number of the step. So a
    resumed run draws the same ones, and so does every process and accumulated batch of a step.

    Beside what [`SparseTrainer`] logs there are the terms of the loss without their weights, means
    since the last log (`lm`, `kl`, `nmse`, `dense_to_sparse`, `sparse_to_dense`), and `encode_nmse`
    and `decode_nmse`, means over locations. Evaluation runs the hybrids at all locations; it adds
    the terms and, by location, `eval_encode_nmse_0` and so on. The logged `eval_perplexity` is the
    sparse model's.

    Args:
        model: a [`BridgedCausalLM`].
        args: [`BridgeTrainingArguments`].
        data_collator, train_dataset, eval_dataset, processing_class: as in `Trainer`.
        callbacks, optimizers, optimizer_cls_and_kwargs: as in [`SparseTrainer`].

    Raises:
        TypeError: `model` or `args` is of another type.
    """

    args: BridgeTrainingArguments
    can_be_sharded = False
    loss_is_scaled_for_ga = False
    _cross_entropy = "lm"

    def __init__(
        self,
        model: BridgedCausalLM | None = None,
        args: BridgeTrainingArguments | None = None,
        data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Optimizer | None, LRScheduler | None] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[Optimizer], dict[str, Any]] | None = None,
    ) -> None:
        args = BridgeTrainingArguments() if args is None else args
        if not isinstance(args, BridgeTrainingArguments):
            raise TypeError(
                f"args is a {type(args).__name__}, expected BridgeTrainingArguments: build that "
                "with the same values."
            )
        if not isinstance(model, BridgedCausalLM):
            raise TypeError(
                f"model is a {type(model).__name__}, expected a BridgedCausalLM: make one with "
                "BridgedCausalLM.from_models(dense)."
            )
        self._sums: dict[str, torch.Tensor] = {}
        self._batches = 0
        super().__init__(
            model, args, data_collator=data_collator, train_dataset=train_dataset,
            eval_dataset=eval_dataset, processing_class=processing_class, callbacks=callbacks,
            optimizers=optimizers, optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
        )  # fmt: skip

    def sampled_locations(self, step: int) -> dict[str, list[int]]:
        """The locations at which the hybrid runs of a training step switch models."""
        args, n_locations = self.args, self._bridged.n_locations
        generator = random.Random(f"bridge locations/{args.seed}/{step}")
        count = min(args.hybrid_locations, n_locations)
        enter_at, leave_at = (sorted(generator.sample(range(n_locations), count)) for _ in range(2))
        return {
            "enter_at": enter_at if args.dense_to_sparse_weight else [],
            "leave_at": leave_at if args.sparse_to_dense_weight else [],
        }

    def _param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        if self.args.sparse_bridges:
            return super()._param_groups(model)
        groups = []
        for group in super()._param_groups(model):
            bridges = [n for n in group["params"] if fnmatchcase(n[0], BRIDGE_PARAMETERS)]
            others = [n for n in group["params"] if not fnmatchcase(n[0], BRIDGE_PARAMETERS)]
            groups += [{**group, "params": others}] if others else []
            groups += [{**group, "params": bridges, "sharkfin": False}] if bridges else []
        return groups

    @property
    def _bridged(self) -> BridgedCausalLM:
        return self.accelerator.unwrap_model(self.model)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, BridgeOutput]:
        """The weighted sum of the terms; see `Trainer.compute_loss`."""
        bridged, args = self._bridged, self.args
        if model.training:
            if args.standardize_bridges and not all(b.is_standardized for b in bridged.bridges):
                mask = inputs.get("attention_mask")
                standardize_bridges_(bridged, inputs["input_ids"], mask, self.accelerator)
            locations = self.sampled_locations(self.state.global_step)
        else:
            everywhere = list(range(bridged.n_locations))
            locations = {"enter_at": everywhere, "leave_at": everywhere}
        inputs = {"labels": inputs["input_ids"], **inputs}
        output = model(**inputs, **locations, loss_weights=args.loss_weights())
        self._count(output, by_location=not model.training)
        return (output.loss, output) if return_outputs else output.loss

    def _count(self, output: BridgeOutput, by_location: bool) -> None:
        values = {name: output[name] for name in LOSS_TERMS if name in output}
        for name in BY_LOCATION:
            if name in output:
                if name.endswith("_nmse"):
                    values[name] = output[name].mean()
                if by_location:
                    values |= {f"{name}_{i}": value for i, value in enumerate(output[name])}
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.detach().float()
        self._batches += 1

    def _take_means(self) -> dict[str, float]:
        """Means over batches and processes since the last call."""
        if not self._batches:
            return {}
        names = list(self._sums)
        means = torch.stack([self._sums[name] for name in names]) / self._batches
        means = self.accelerator.gather(means[None]).mean(0)
        self._sums, self._batches = {}, 0
        return dict(zip(names, means.tolist(), strict=True))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log; training logs get the terms of the loss."""
        if "loss" in logs:
            logs.update(self._take_means())
        super().log(logs, start_time)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As [`SparseTrainer`]'s, with every term, also by location."""
        training = self._sums, self._batches
        self._sums, self._batches = {}, 0
        output = super().evaluation_loop(
            dataloader, description, True, ignore_keys, metric_key_prefix
        )
        means = self._take_means()
        self._sums, self._batches = training
        output.metrics.update({f"{metric_key_prefix}_{n}": value for n, value in means.items()})
        self._add_perplexity(output.metrics, metric_key_prefix)
        return output

    def _card(self, **fields: Any) -> ModelCard:
        summary = {
            name.removeprefix("eval_"): value
            for log in self.state.log_history  # the last one counts
            for name, value in log.items()
            if name.startswith("eval_")
        }
        return bridge_card(self._bridged, summary=summary, mark=True, **fields)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        self._check_sparsifier_of(resume_from_checkpoint)
        path = Path(resume_from_checkpoint) / WEIGHTS_NAME
        if not path.is_file():
            raise ValueError(
                f"{resume_from_checkpoint} holds no {WEIGHTS_NAME}; pass a checkpoint folder of a "
                "BridgeTrainer."
            )
        load_adapter_weights(self._bridged, load_file(path), path)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)
