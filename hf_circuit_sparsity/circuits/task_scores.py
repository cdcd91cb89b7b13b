"""Accuracy and loss of the full model on each binary task; a task that cannot be asked says why."""

from collections.abc import Sequence
from dataclasses import dataclass

from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..tasks.binary_task import TaskNotExpressibleError, TaskTooLongError
from ..tasks.load import list_tasks, load_task
from .task_loss import binary_accuracy, binary_loss, model_scores


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
        names: tasks; all of `list_tasks()` if not given.
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
    was_training = model.training
    model.eval()
    scores = []
    names = list_tasks() if names is None else list(names)
    try:
        for name in tqdm(names, desc="tasks", disable=not progress, leave=False):
            try:
                task = load_task(
                    name,
                    tokenizer,
                    n_train=n_train,
                    n_test=n_test,
                    seed=seed,
                    max_length=getattr(model.config, "max_position_embeddings", None),
                )
            except (TaskNotExpressibleError, TaskTooLongError) as error:
                scores.append(TaskScore(name, problem=str(error)))
                continue
            train, test = task.tensors("train"), task.tensors("test")
            whole = model_scores(model, train, test)
            calibrated = whole.calibration.pairs(whole.test, test)
            scores.append(
                TaskScore(
                    name,
                    accuracy=binary_accuracy(whole.test),
                    loss=binary_loss(whole.test).item(),
                    calibrated_loss=binary_loss(calibrated).item(),
                    prompts=len(whole.test),
                )
            )
    finally:
        model.train(was_training)
    return scores
