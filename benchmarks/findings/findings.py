"""What the scripts about findings share: circuits of trained models, found once and stored.

A script that was stopped goes on: models, circuits and figures that are in the folder are not made
again.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from hf_circuit_sparsity.circuits.ablation import (
    ReferenceMeans,
    reference_input_ids,
    reference_means,
)
from hf_circuit_sparsity.circuits.circuit import Circuit
from hf_circuit_sparsity.circuits.pruning.config import PruningConfig
from hf_circuit_sparsity.circuits.pruning.find import (
    TaskNotLearnedError,
    find_circuits,
)
from hf_circuit_sparsity.circuits.task_scores import evaluate_tasks
from hf_circuit_sparsity.commands.console import say
from hf_circuit_sparsity.files import replacing
from hf_circuit_sparsity.metrics.circuit_size.geometric_mean import geometric_mean
from hf_circuit_sparsity.modeling.modeling_circuitgpt import CircuitGPTForCausalLM
from hf_circuit_sparsity.tasks.binary_task import BinaryTask
from hf_circuit_sparsity.tasks.load import load_task

from ..experiment import Experiment, mean, stored
from .trained_models import FOLDER, load_trained, training_summary

TARGETS = (0.15, 0.3, 0.5)
# At which models are compared. Not the paper's 0.15: too few tasks are done that well by all of the
# small models compared.
COMPARED = 0.3
# Fewer updates and prompts than the defaults, so that the whole of it runs on two CPU cores.
CONFIG = PruningConfig(
    max_steps=120,
    batch_size=16,
    learning_rate=1e-2,
    selection_prompts=256,
    screen_prompts=64,
    reference_tokens=32768,
    num_seeds=2,
)
# How circuits are looked for. A node of a dense circuit of a hundred carries about 1e-3 nats, so at
# a price far below that masks stay open and the clean-up has most of the work.
SEARCHES = {
    "quick": CONFIG,
    "brisk": replace(CONFIG, node_penalty=1e-3, learning_rate=2e-2),
    "dear": replace(CONFIG, node_penalty=1e-3, max_steps=240),
    "dear, twice the updates": replace(CONFIG, node_penalty=1e-3, max_steps=480),
    "dearer": replace(CONFIG, node_penalty=3e-3, max_steps=240),
    "thorough": replace(
        CONFIG,
        max_steps=400,
        learning_rate=3e-3,
        batch_size=16,
        selection_prompts=1024,
        num_seeds=3,
    ),
}


class Loaded(NamedTuple):
    """A trained model and what pruning needs to know about it."""

    model: CircuitGPTForCausalLM
    tokenizer: Any
    means: ReferenceMeans


@lru_cache(maxsize=2)
def loaded(name: str, folder: Path = FOLDER) -> Loaded:
    """A model of `trained_models.RECIPES`, trained first where it is not there yet."""
    model, tokenizer = load_trained(name, folder)
    path = folder / "reference_tokens.npy"
    if not path.is_file():  # tokenizing the corpus takes longer than all that uses it
        ids = reference_input_ids(model, tokenizer, None, CONFIG.reference_tokens)
        with replacing(path) as temporary:
            np.save(temporary, ids.numpy().astype(np.int32))
    reference = torch.from_numpy(np.load(path)).long()
    reference = reference_input_ids(model, tokenizer, reference, CONFIG.reference_tokens)
    return Loaded(model, tokenizer, reference_means(model, reference))


@lru_cache(maxsize=8)
def task_for(name: str, task: str, folder: Path = FOLDER, search: str = "quick") -> BinaryTask:
    """A task under a model's tokenizer, with twice the prompts that the search selects on."""
    model, tokenizer, _ = loaded(name, folder)
    return load_task(
        task,
        tokenizer,
        n_train=2 * SEARCHES[search].selection_prompts,
        n_test=256,
        max_length=model.config.max_position_embeddings,
    )


def task_losses(name: str, folder: Path = FOLDER) -> dict[str, dict[str, float]]:
    """Task → accuracy, loss and calibrated loss of a trained model, for tasks it can be asked."""

    def compute() -> dict[str, Any]:
        say(f"Measuring {name} on the tasks")
        model, tokenizer, _ = loaded(name, folder)
        scores = evaluate_tasks(model, tokenizer, n_train=256, n_test=256)
        return {score.task: asdict(score) for score in scores if not score.problem}

    return stored(folder / "measured" / name / "tasks.json", compute)


def learned_tasks(name: str, folder: Path = FOLDER, target: float = COMPARED) -> list[str]:
    """The tasks that the whole model, calibrated, does well enough for a circuit of that target,
    on held-out prompts."""
    most = target * CONFIG.selection_margin
    scores = task_losses(name, folder)
    return sorted(task for task, s in scores.items() if s["calibrated_loss"] <= most)


def circuit_folder(
    name: str, task: str, target: float, seed: int, folder: Path = FOLDER, search: str = "quick"
) -> Path:
    """Where a circuit of a model is stored."""
    return folder / _of_search("circuits", search) / name / task / f"loss-{target:g}-seed{seed}"


def _frontier_file(name: str, task: str, folder: Path, search: str) -> Path:
    return folder / "measured" / name / _of_search("frontier", search) / f"{task}.json"


def _of_search(kind: str, search: str) -> str:
    return kind if search == "quick" else f"{kind}-{search.replace(',', '').replace(' ', '-')}"


def frontier(
    name: str,
    task: str,
    folder: Path = FOLDER,
    targets: Sequence[float] = TARGETS,
    search: str = "quick",
) -> list[dict[str, Any]]:
    """The circuits of a model for a task, one row for every target and seed.

    Rows have `target`, `seed` and the metrics of [`evaluate_circuit`]; targets that the whole model
    does not reach have none.

    Args:
        name: of `trained_models.RECIPES`.
        task: its name.
        folder: with models, circuits and figures.
        targets: losses in nats, ascending; what is kept already is returned whatever they are.
        search: of `SEARCHES`.
    """

    def compute() -> list[dict[str, Any]]:
        say(f"Looking for circuits: {name}, {task} ({search})")
        model, _, means = loaded(name, folder)
        for first in range(len(targets)):
            try:
                found = find_circuits(
                    model,
                    task_for(name, task, folder, search),
                    SEARCHES[search],
                    reference=means,
                    targets=targets[first:],
                )
            except TaskNotLearnedError:
                continue
            break
        else:
            return []
        rows = []
        for circuit in found:
            target, seed = circuit.config["target_loss"], circuit.config["seed"]
            path = circuit_folder(name, task, target, seed, folder, search)
            circuit.save_pretrained(path)
            rows.append({"target": target, "seed": seed, **circuit.metrics})
        return rows

    return stored(_frontier_file(name, task, folder, search), compute)


def stored_tasks(
    names: Sequence[str], tasks: Sequence[str], folder: Path = FOLDER, search: str = "quick"
) -> list[str]:
    """The tasks whose circuits are there already for all the models."""
    return [t for t in tasks if all(_frontier_file(n, t, folder, search).is_file() for n in names)]


def stored_circuits(
    name: str, task: str, target: float, folder: Path = FOLDER, search: str = "quick"
) -> list[Circuit]:
    """The circuits of all seeds that [`frontier`] found."""
    rows = [r for r in frontier(name, task, folder, search=search) if r["target"] == target]
    return [
        Circuit.from_pretrained(circuit_folder(name, task, target, row["seed"], folder, search))
        for row in rows
    ]


def lowest_common_target(rows: Sequence[Sequence[dict[str, Any]]]) -> float | None:
    """The lowest target at which every model has circuits, of models' rows for one task."""
    reached = (t for t in TARGETS if all(smallest(of_model, t) for of_model in rows))
    return next(reached, None)


def smallest(rows: Sequence[dict[str, Any]], target: float) -> dict[str, Any] | None:
    """The row with the fewest edges at a target."""
    at = [row for row in rows if row["target"] == target]
    return min(at, key=lambda row: (row["edges"], row["nodes"]), default=None)


def edges_mean(values: Sequence[float]) -> float:
    """Geometric mean; a circuit without edges counts as one of one edge."""
    return geometric_mean([max(1.0, value) for value in values]) if values else math.nan


def model_row(name: str, folder: Path = FOLDER) -> dict[str, object]:
    """What the tables say about a trained model."""
    summary, scores = training_summary(name, folder), task_losses(name, folder)
    return {
        "model": name,
        "validation loss": f"{summary['loss']:.3f}",
        "nonzeros": f"{summary['nonzeros']:,}",
        "mean task loss": f"{mean([s['calibrated_loss'] for s in scores.values()]):.3f}",
    }


def main(run: Callable[[Experiment], str], description: str | None, name: str) -> None:
    """The command line of an experiment on circuits of trained models."""
    Experiment.main(run, description, name, str(FOLDER))
