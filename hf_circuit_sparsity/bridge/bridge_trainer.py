"""The Hugging Face ``Trainer`` for a sparse twin and its bridges to a dense model."""

import random
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput

from ..trainer.sparse_trainer import SparseTrainer
from .bridge_config import BRIDGE_PARAMETERS, BridgeTrainingArguments
from .checkpoint import WEIGHTS_NAME, load_adapter_weights
from .initialization import standardize_bridges_
from .modeling_bridge import LOSS_TERMS, BridgedCausalLM, BridgeOutput

# What every location has a figure of, by its name in the model's output.
BY_LOCATION = ("encode_nmse", "decode_nmse", "dense_to_sparse_kl", "sparse_to_dense_kl")


class BridgeTrainer(SparseTrainer):
    """Trains the sparse twin of a frozen dense model, and the bridges between the two.

    Takes what :class:`SparseTrainer` takes, with a :class:`BridgedCausalLM` as ``model`` and
    :class:`BridgeTrainingArguments` as ``args``. The twin becomes sparse as any model does there
    (top-k or random coordinate descent), the bridges stay dense unless ``sparse_bridges``.

    With ``standardize_bridges``, bridges that have no units yet (see
    :func:`standardize_bridges_`) get them from the first batch. The learning rate of bridges has no
    sharkfin factor unless they become sparse themselves.

    The locations of a step's hybrid runs follow from the seed and the number of the step, so that a
    resumed run draws the same, and every process and every accumulated batch of a step too.

    Beside what :class:`SparseTrainer` logs there are the terms of the loss without their weights,
    means since the last log: ``lm``, ``kl``, ``nmse``, ``dense_to_sparse``, ``sparse_to_dense``,
    and ``encode_nmse`` and ``decode_nmse``, means over locations. Evaluation runs the hybrids at
    all locations; it adds the terms and, by location, ``eval_encode_nmse_0`` and so on.
    ``eval_perplexity`` is that of the twin.

    Raises:
        TypeError: if ``model`` or ``args`` is of another kind.
    """

    args: BridgeTrainingArguments
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: BridgedCausalLM | None = None,
        args: BridgeTrainingArguments | None = None,
        *trainer_args: Any,
        **trainer_kwargs: Any,
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
        self._counted = 0
        super().__init__(model, args, *trainer_args, **trainer_kwargs)

    def sampled_locations(self, step: int) -> dict[str, list[int]]:
        """Where the hybrid runs of a training step enter and leave the twin."""
        args, n_locations = self.args, self._bridged.n_locations
        generator = random.Random(f"bridge locations/{args.seed}/{step}")
        count = min(args.hybrid_locations, n_locations)
        draws = {
            "enter_at": sorted(generator.sample(range(n_locations), count)),
            "leave_at": sorted(generator.sample(range(n_locations), count)),
        }
        return {
            "enter_at": draws["enter_at"] if args.dense_to_sparse_weight else [],
            "leave_at": draws["leave_at"] if args.sparse_to_dense_weight else [],
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
        """The weighted sum of the terms; see ``Trainer.compute_loss``."""
        bridged = self._bridged
        everywhere = list(range(bridged.n_locations))
        if (
            model.training
            and self.args.standardize_bridges
            and not all(bridge.has_units for bridge in bridged.bridges)
        ):
            mask = inputs.get("attention_mask")
            standardize_bridges_(bridged, inputs["input_ids"], mask, self.accelerator)
        places = (
            self.sampled_locations(self.state.global_step)
            if model.training
            else {"enter_at": everywhere, "leave_at": everywhere}
        )
        inputs = dict(inputs)
        inputs.setdefault("labels", inputs["input_ids"])
        output = model(**inputs, **places, loss_weights=self.args.loss_weights())
        self._count(output, by_location=not model.training)
        return (output.loss, output) if return_outputs else output.loss

    def _count(self, output: BridgeOutput, by_location: bool) -> None:
        figures = {name: output.get(name) for name in LOSS_TERMS}
        for name in BY_LOCATION:
            values = output.get(name)
            if values is None:
                continue
            if name.endswith("_nmse"):
                figures[name] = values.mean()
            if by_location:
                figures |= {f"{name}_{i}": value for i, value in enumerate(values)}
        for name, value in figures.items():
            if value is not None:
                self._sums[name] = self._sums.get(name, 0.0) + value.detach().float()
        self._counted += 1

    def _take_means(self) -> dict[str, float]:
        """Means over batches and processes of what was counted; starts counting anew."""
        if not self._counted:
            return {}
        names = list(self._sums)
        means = torch.stack([self._sums[name] for name in names]) / self._counted
        means = self.accelerator.gather(means[None]).mean(0)
        self._sums, self._counted = {}, 0
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
        """As ``SparseTrainer``'s, with every term and its figures by location."""
        # What training has counted since its last log comes back afterwards.
        kept = self._sums, self._counted
        self._sums, self._counted = {}, 0
        output = super().evaluation_loop(
            dataloader, description, True, ignore_keys, metric_key_prefix
        )
        means = self._take_means()
        self._sums, self._counted = kept
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in means.items()}
        output.metrics.update(metrics)
        if "lm" in means:
            perplexity = torch.tensor(means["lm"], dtype=torch.float64).exp().item()
            output.metrics[f"{metric_key_prefix}_perplexity"] = perplexity
        return output

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        path = Path(resume_from_checkpoint) / WEIGHTS_NAME
        if not path.is_file():
            raise ValueError(
                f"{resume_from_checkpoint} holds no {WEIGHTS_NAME}, so it is no checkpoint of a "
                "BridgeTrainer; pass one of its checkpoint folders."
            )
        load_adapter_weights(self._bridged, load_file(path), path)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)
