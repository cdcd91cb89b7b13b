"""Checks what a page is asked of, and writes it."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ...tasks.binary_task import BinaryTask
from ...tasks.load import list_tasks, load_task
from ..reference_tokens import ReferenceTokens
from .gathering import Gathering, shortened
from .page import render_page
from .settings import ReportConfig

if TYPE_CHECKING:
    from ..circuit import Circuit


def write_report(
    circuit: "Circuit",
    path: str | os.PathLike,
    model: nn.Module,
    tokenizer: Any,
    *,
    task: BinaryTask | None = None,
    reference: ReferenceTokens = None,
    config: ReportConfig | None = None,
    progress: bool = True,
) -> Path:
    """Write a page on which a person sees what the circuit does: one HTML file.

    It needs no network and no server, and is a static Space as it is. What it shows is measured
    anew: ablation effects, activations, attention, the loss of smaller circuits.

    Args:
        circuit: of `model`.
        path: where to, e.g. `index.html`.
        model: the model the circuit was cut out of.
        tokenizer: the model's.
        task: the task it was found for; made anew if it is a built-in one.
        reference: sample of the pretraining distribution for examples; see [`find_circuit`].
        config: how many prompts, tokens and examples.
        progress: show progress bars.

    Returns:
        The path.

    Raises:
        ValueError: an empty circuit, one of another model, or of a task that is not built in and
            was not passed.
    """
    path = Path(path)
    data = report_data(
        circuit, model, tokenizer, task=task, reference=reference, config=config, progress=progress
    )
    page = render_page(data)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, path)
    return path


def report_data(
    circuit: "Circuit",
    model: nn.Module,
    tokenizer: Any,
    *,
    task: BinaryTask | None = None,
    reference: ReferenceTokens = None,
    config: ReportConfig | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """All that the page of a circuit shows, as plain values for JSON."""
    config = config or ReportConfig()
    circuit.check_model(model)
    if not len(circuit):
        raise ValueError(
            f"The circuit for {circuit.task!r} has no nodes, so there is nothing to show; find one "
            "with find_circuit."
        )
    was_training = model.training
    model.eval()
    try:
        if task is None:
            task = _task_of(circuit, model, tokenizer, config.seed)
        return Gathering(circuit, model, tokenizer, task, config, progress).run(reference)
    finally:
        model.train(was_training)


def _task_of(circuit: "Circuit", model: nn.Module, tokenizer: Any, seed: int) -> BinaryTask:
    """The built-in task, with the prompts that the circuit was found and checked with."""
    if circuit.task not in list_tasks():
        raise ValueError(
            f"The circuit is for {shortened(circuit.task, 80)!r}, which is not a built-in task; "
            "pass the task it was found with as task=."
        )
    found_with = circuit.config.get("seed")
    if type(found_with) is int:
        seed = found_with
    return load_task(
        circuit.task, tokenizer, seed=seed, max_length=model.config.max_position_embeddings
    )
