"""Loss and accuracy of a model on binary tasks, and the calibration of its logits.

A task asks for one of two tokens at the last position of a left-padded prompt. What is measured is
the pair of their logits, `(n, 2)`: the right token's first, the other's second.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..metrics.task_loss.pair_loss import task_accuracy
from ..tasks.binary_task import TaskTooLongError
from ..tasks.encoding import TaskNotExpressibleError
from ..tasks.load import list_tasks, load_task
from .ablation import measuring

TaskTensors = Mapping[str, torch.Tensor]


def candidates(tensors: TaskTensors) -> torch.Tensor:
    """Token ids `(n, 2)` of the right and of the wrong answer."""
    return torch.stack([tensors["target_ids"], tensors["counterfactual_target_ids"]], dim=1)


def pair_logits(model: nn.Module, tensors: TaskTensors) -> torch.Tensor:
    """Logits `(n, 2)` of the two candidates after each prompt, in one forward pass.

    Args:
        model: a causal language model.
        tensors: those of [`next_token_logits`]; `target_ids` and `counterfactual_target_ids`
            `(n,)`.
    """
    logits = next_token_logits(model, tensors)
    return logits.gather(1, candidates(tensors).to(logits.device))


def next_token_logits(model: nn.Module, tensors: TaskTensors) -> torch.Tensor:
    """Logits `(n, vocabulary)`, float32, after each prompt, in one forward pass.

    Args:
        model: a causal language model.
        tensors: `input_ids` and `attention_mask` `(n, length)`, left-padded.
    """
    device = next(model.parameters()).device
    output = model(
        input_ids=tensors["input_ids"].to(device),
        attention_mask=tensors["attention_mask"].to(device),
        use_cache=False,
        logits_to_keep=1,
    )
    return output.logits[:, -1].float()


def task_rows(tensors: TaskTensors, rows: Any) -> dict[str, torch.Tensor]:
    """Some rows of a task's tensors, by anything that indexes the first dimension."""
    return {name: tensor[rows] for name, tensor in tensors.items()}


def trimmed(tensors: TaskTensors) -> dict[str, torch.Tensor]:
    """Without the columns that are padding in every row of left-padded prompts."""
    first = int(tensors["attention_mask"].any(0).int().argmax())
    return {k: v[:, first:] if v.dim() == 2 else v for k, v in tensors.items()}


@torch.no_grad()
def all_pair_logits(
    model: nn.Module,
    tensors: TaskTensors,
    batch_size: int = 128,
    logits: Callable[[nn.Module, TaskTensors], torch.Tensor] = pair_logits,
) -> torch.Tensor:
    """As [`pair_logits`] or, if that is passed, [`next_token_logits`]: in batches, without
    gradients, on the CPU."""
    # Prompts of like length together: nothing is computed for padding.
    order = tensors["attention_mask"].sum(1).argsort(stable=True)
    parts = [
        logits(model, trimmed(task_rows(tensors, rows))).cpu() for rows in order.split(batch_size)
    ]
    return torch.cat(parts)[order.argsort()]


def binary_loss(pairs: torch.Tensor) -> torch.Tensor:
    """Cross-entropy on the two candidates `(..., n, 2)`: mean over n of -log p(right), in nats.

    What is optimised; `task_loss` of the metric of that name is the same number for reports.
    """
    return F.softplus(pairs[..., 1] - pairs[..., 0]).mean(-1)


def binary_accuracy(pairs: torch.Tensor) -> float:
    """Share of rows in which the right candidate has the larger logit."""
    return task_accuracy(pairs.numpy(force=True))


@dataclass(frozen=True)
class Calibration:
    """Scale of all logits and shift of single tokens' logits (Gao et al. 2025, appendix A.5).

    Attributes:
        scale: multiplies every logit.
        shift: token id → what is added to its logit afterwards.
    """

    scale: float = 1.0
    shift: dict[int, float] = field(default_factory=dict)

    def pairs(self, pairs: torch.Tensor, tensors: TaskTensors) -> torch.Tensor:
        """Calibrate the candidates' logits `(n, 2)`."""
        shifts = torch.zeros_like(pairs)
        tokens = candidates(tensors)
        for token, value in self.shift.items():
            shifts[tokens == token] = value
        return self.scale * pairs + shifts

    def logits(self, logits: torch.Tensor) -> torch.Tensor:
        """Calibrate whole logits `(..., vocabulary)`."""
        logits = self.scale * logits
        for token, value in self.shift.items():
            logits[..., token] += value
        return logits


def fit_calibration(pairs: torch.Tensor, tensors: TaskTensors, steps: int = 16) -> Calibration:
    """Fit scale and shift of a whole model to the task's cross-entropy by L-BFGS.

    The shift is fitted only for tasks with one pair of candidates throughout; with many, it would
    learn the answers by heart. The scale lies between 0.1 and 10, so that a model that prefers the
    wrong answer stays wrong, and the shift between the two candidates between -10 and 10.

    A circuit takes over the calibration of its model. Fitted anew to whatever part of a model is
    tried, scale and shift would make an answer of what leaks through a normalization.

    Args:
        pairs: `(n, 2)` from [`all_pair_logits`].
        tensors: the same rows' token ids.
        steps: L-BFGS steps (16 in the paper).
    """
    tokens = candidates(tensors)
    distinct = tokens.unique().tolist()
    sign = torch.zeros(len(pairs))
    if len(distinct) == 2:
        sign = torch.where(tokens[:, 0] == distinct[0], 1.0, -1.0)
    difference = pairs[:, 0] - pairs[:, 1]
    parameters = torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.LBFGS([parameters], max_iter=steps, line_search_fn="strong_wolfe")

    def scale_and_shift() -> tuple[torch.Tensor, torch.Tensor]:
        bounded = parameters.tanh()
        return 10 ** bounded[0], 10 * bounded[1]

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        scale, shift = scale_and_shift()
        # The small pull to 1 and 0 keeps a perfectly separated task from the bounds.
        pull = 1e-4 * ((scale - 1) ** 2 + shift**2)
        loss = F.softplus(-(scale * difference + shift * sign)).mean() + pull
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    scale, shift = (value.item() for value in scale_and_shift())
    if len(distinct) == 2:
        return Calibration(scale, {distinct[0]: shift / 2, distinct[1]: -shift / 2})
    return Calibration(scale)


class ModelScores(NamedTuple):
    """What a whole model answers on a task, measured once and compared with many circuits."""

    train: torch.Tensor
    """Logits `(n, 2)` of the two candidates on the training prompts."""
    test: torch.Tensor
    """The same on the held-out prompts."""
    calibration: Calibration
    """Fitted on the training prompts."""


def model_scores(
    model: nn.Module, train: TaskTensors, test: TaskTensors, steps: int = 16
) -> ModelScores:
    """Measure a model in eval mode on both splits of a task, with `steps` to calibrate it."""
    pairs = all_pair_logits(model, train)
    return ModelScores(pairs, all_pair_logits(model, test), fit_calibration(pairs, train, steps))


@dataclass(frozen=True)
class TaskScore:
    """What a model makes of one task's held-out prompts.

    Attributes:
        task: its name.
        accuracy: share of prompts whose right answer has the larger logit; 0.5 is guessing.
        loss: mean cross-entropy on the two candidate tokens, in nats; ln 2 ≈ 0.69 is guessing.
        calibrated_loss: the same after a scale and a shift of the logits fitted on training
            prompts, which is what a circuit's loss is compared with.
        prompts: how many held-out prompts.
        problem: why the task could not be asked, in one sentence; the numbers are None then.
    """

    task: str
    accuracy: float | None = None
    loss: float | None = None
    calibrated_loss: float | None = None
    prompts: int = 0
    problem: str = ""


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str] | None = None,
    *,
    n_train: int = 512,
    n_test: int = 512,
    seed: int = 0,
    progress: bool = True,
) -> list[TaskScore]:
    """Accuracy and loss of a model on every task.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        names: tasks, as for [`load_task`]; the built-in ones on Python if not given.
        n_train: training prompts for the calibration.
        n_test: held-out prompts.
        seed: another seed, other prompts.
        progress: show a progress bar.

    Returns:
        One score per task, in the order asked. A task that the tokenizer cannot express or whose
        prompts are longer than the model's context has no numbers but a `problem`.

    Raises:
        ValueError: an unknown task, or numbers of prompts that `load_task` refuses.
    """
    settings: dict[str, Any] = {"n_train": n_train, "n_test": n_test, "seed": seed}
    settings["max_length"] = getattr(model.config, "max_position_embeddings", None)
    scores = []
    names = list_tasks("python") if names is None else list(names)
    with measuring(model):
        for name in tqdm(names, desc="tasks", disable=not progress, leave=False):
            try:
                task = load_task(name, tokenizer, **settings)
            except (TaskNotExpressibleError, TaskTooLongError) as error:
                scores.append(TaskScore(name, problem=str(error)))
                continue
            test = task.tensors("test")
            whole = model_scores(model, task.tensors("train"), test)
            calibrated = whole.calibration.pairs(whole.test, test)
            scores.append(
                TaskScore(
                    task.name,
                    accuracy=binary_accuracy(whole.test),
                    loss=binary_loss(whole.test).item(),
                    calibrated_loss=binary_loss(calibrated).item(),
                    prompts=len(whole.test),
                )
            )
    return scores
