"""`hf-circuit-sparsity evaluate`: accuracy and loss of a model on the tasks."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from ..circuits.task_scores import TaskScore, evaluate_tasks
from ..files import check_can_write, write_json
from ..modeling.fingerprint import model_fingerprint
from ..tasks.load import check_tasks, list_tasks
from .console import columns, on_terminal, quiet_libraries, say
from .loading import load_model

FILE_NAME = "task_evaluation.json"
LEARNED_LOSS = 0.15  # the default target of PruningConfig


def run_evaluate(
    model: str,
    tasks: Sequence[str] | None = None,
    output_dir: str | None = None,
    *,
    prompts: int = 512,
    seed: int = 0,
) -> list[TaskScore]:
    """Measure a saved model on the tasks, print a table and write the numbers as JSON.

    Args:
        model: folder or Hub id of a model with its tokenizer.
        tasks: as for [`load_task`]; the built-in ones on Python if not given.
        output_dir: of `task_evaluation.json`; if not given the model's folder. Nothing is written
            for a model from the Hub.
        prompts: held-out prompts per task, and as many training prompts for the calibration.
        seed: of the prompts.

    Raises:
        ValueError, OSError: no such model or task, or prompts that `load_task` refuses.
    """
    quiet_libraries()
    tasks = list_tasks("python") if tasks is None else tasks
    check_tasks(tasks)
    if output_dir is not None or Path(model).is_dir():
        check_can_write(output_dir or model)
    loaded, tokenizer = load_model(model)
    scores = evaluate_tasks(
        loaded, tokenizer, tasks, n_train=prompts, n_test=prompts, seed=seed,
        progress=on_terminal(),
    )  # fmt: skip
    say(scores_table(scores))
    saved = loaded.name_or_path
    folder = output_dir or (saved if Path(saved).is_dir() else None)
    if folder is not None:
        content = {
            "model": model,
            "model_fingerprint": model_fingerprint(loaded),
            "seed": seed,
            "tasks": [asdict(score) for score in scores],
        }
        write_json(Path(folder) / FILE_NAME, content)
        say(f"\nWritten to {Path(folder) / FILE_NAME}")
    return scores


def scores_table(scores: Sequence[TaskScore]) -> str:
    """A table of the tasks, best first, and below it the tasks that could not be asked."""
    asked = sorted((s for s in scores if not s.problem), key=lambda s: s.calibrated_loss)
    parts = []
    if asked:
        rows = [
            (
                s.task,
                f"{s.accuracy:.1%}",
                f"{s.loss:.3f}",
                f"{s.calibrated_loss:.3f}",
                "yes" if s.calibrated_loss <= LEARNED_LOSS else "no",
            )
            for s in asked
        ]
        parts.append(columns(("task", "accuracy", "loss", "calibrated", "learned"), rows))
        learned = sum(row[-1] == "yes" for row in rows)
        parts.append(
            f"{learned} of {len(asked)} learned: a calibrated loss of at most {LEARNED_LOSS} nats, "
            f"so that a circuit can reach it.\nOn {asked[0].prompts} held-out prompts each; "
            "guessing is 50 % and 0.693 nats."
        )
    refused = [s for s in scores if s.problem]
    if refused:
        parts.append("Could not be asked:\n" + "\n".join(f"  {s.problem}" for s in refused))
    return "\n\n".join(parts)
