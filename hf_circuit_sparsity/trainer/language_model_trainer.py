"""What a `Trainer` must know of models that predict the next token."""

from collections.abc import Callable, Sized
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers.trainer_utils import BestRun, EvalLoopOutput, default_compute_objective

from .checkpoints import WholeCheckpoints


class LanguageModelTrainer(WholeCheckpoints):
    """`Trainer` that smooths the labels of any causal language model, and logs the perplexity.

    The log of an evaluation gets `eval_perplexity`, unless labels are smoothed or the loss is
    `compute_loss_func`'s. What `evaluate` returns has it only for
    `metric_for_best_model="perplexity"`, as others sum up what is there.

    Raises:
        ValueError: the best model is to be that of least perplexity, and there is none.
    """

    # Of the metrics, the one that the perplexity is of.
    _cross_entropy = "loss"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._added_metrics: set[str] = set()
        if self._seeks_perplexity and not self._is_cross_entropy and self.compute_metrics is None:
            raise ValueError(
                "metric_for_best_model='perplexity' was passed, but with label_smoothing_factor or "
                "compute_loss_func the loss has no perplexity: pass 'loss'."
            )
        if self.label_smoother is not None and _predicts_next_token(self.model):
            # Trainer shifts the labels only for the names of classes that it knows.
            self.label_smoother = partial(self.label_smoother, shift_labels=True)

    @property
    def _seeks_perplexity(self) -> bool:
        return (self.args.metric_for_best_model or "").endswith("perplexity")

    @property
    def _is_cross_entropy(self) -> bool:
        return self.label_smoother is None and self.compute_loss_func is None

    def get_train_dataloader(self) -> DataLoader:
        """As `Trainer`'s.

        Raises:
            ValueError: there is nothing to train on.
        """
        if isinstance(self.train_dataset, Sized) and not len(self.train_dataset):
            raise ValueError(
                "train_dataset has no rows, expected at least one: pass more text, or a smaller "
                "block_size."
            )
        return super().get_train_dataloader()

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As `Trainer`'s, with the perplexity."""
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        self._add_perplexity(output.metrics, metric_key_prefix)
        return output

    def _add_perplexity(self, metrics: dict[str, float], prefix: str) -> None:
        """Unless there is one that `compute_metrics` has measured."""
        name, loss = f"{prefix}_perplexity", metrics.get(f"{prefix}_{self._cross_entropy}")
        self._added_metrics.discard(name)
        if loss is not None and name not in metrics and self._is_cross_entropy:
            metrics[name] = torch.tensor(loss, dtype=torch.float64).exp().item()
            self._added_metrics.add(name)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As `Trainer`'s; the perplexity is logged, and returned where it decides on the best."""
        metrics = super().evaluate(*args, **kwargs)
        return metrics if self._seeks_perplexity else self._without_added(metrics)

    def _without_added(self, metrics: dict[str, float]) -> dict[str, float]:
        return {name: v for name, v in metrics.items() if name not in self._added_metrics}

    def hyperparameter_search(
        self,
        hp_space: Callable[[Any], dict[str, float]] | None = None,
        compute_objective: Callable[[dict[str, float]], float] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> BestRun | list[BestRun]:
        """As `Trainer`'s; the default objective leaves out the perplexity added here."""

        def objective(metrics: dict[str, float]) -> float:
            return default_compute_objective(self._without_added(metrics))

        return super().hyperparameter_search(
            hp_space, compute_objective or objective, *args, **kwargs
        )


def _predicts_next_token(model: nn.Module) -> bool:
    """Whether a model is a causal language model; an adapter of PEFT passes both questions on."""
    can_generate = getattr(model, "can_generate", None)
    return can_generate is not None and can_generate() and not model.config.is_encoder_decoder
