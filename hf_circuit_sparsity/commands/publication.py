"""The repositories that a run is published to, laid out as folders of files."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from datasets import DatasetDict
from huggingface_hub import SpaceCard, SpaceCardData
from jinja2 import Environment
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..circuits.card import circuit_card
from ..circuits.circuit import Circuit
from ..circuits.circuit_file import PICTURE_NAME
from ..circuits.task_scores import TaskScore
from ..circuits.viewer.plot import plot_circuit
from ..circuits.viewer.report import write_report
from ..circuits.viewer.report_data import ReportConfig
from ..modeling.causal_lm import save_nonzeros
from ..modeling.fingerprint import model_fingerprint
from ..modeling.sparse_checkpoint import SparsePreTrainedModel
from ..tasks.load import list_tasks, load_task
from ..tasks.task_repository import write_task_datasets
from ..trainer.model_card import model_card
from .console import check_can_draw, on_terminal
from .evaluate import FILE_NAME as SCORES_NAME
from .loading import load_model
from .training import SUMMARY_NAME

# As long as a commit hash: a dry run counts the bytes before there is a commit.
UNKNOWN_COMMIT = "0" * 40
# Sizes of what is made for publishing.
ROWS = {"n_train": 2000, "n_test": 512}
REPORT = ReportConfig()


@dataclass(frozen=True)
class Run:
    """What an output folder of `quickstart` or `train` holds.

    Attributes:
        model: the trained model.
        tokenizer: the model's.
        circuits: name → circuit; the name is its folder on the Hub.
        summary: the numbers of its training; empty if unknown.
        scores: what `evaluate` measured on this very model; empty if it was not run.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    circuits: dict[str, Circuit]
    summary: dict[str, Any]
    scores: list[TaskScore]


@dataclass(frozen=True)
class Part:
    """One repository to publish.

    Attributes:
        what: a word for its content.
        kind: of repository.
        repo_id: its Hub id.
        lay_out: writes its files into a folder; takes the folder and the commit hash of the model.
    """

    what: str
    kind: Literal["model", "dataset", "space"]
    repo_id: str
    lay_out: Callable[[Path, str], None]


def read_run(run_dir: str) -> Run:
    """Read the model, its tokenizer and the circuits below a folder.

    Raises:
        ValueError: there is no model, or a circuit is damaged or of another model.
    """
    folder = Path(run_dir)
    if not folder.is_dir():
        raise ValueError(f"There is no folder {run_dir!r}; pass that of quickstart or train.")
    model, tokenizer = load_model(run_dir, dtype="auto")
    saved = Path(model.name_or_path)
    circuits: dict[str, Circuit] = {}
    for path in sorted(folder.rglob("circuit.json")):
        if any(part.startswith((".", "checkpoint-")) for part in path.relative_to(folder).parts):
            continue
        circuit = Circuit.from_pretrained(path.parent)
        try:
            circuit.check_model(model)
        except ValueError as error:
            raise ValueError(f"{path.parent}: {error}") from error
        name = circuit.task
        same = [c for c in circuits.values() if c.task == name]
        if any(other.own_task != circuit.own_task for other in same):
            raise ValueError(
                f"{path.parent}: another circuit of this run is for a task {name!r} with other "
                "prompts; give one of the tasks another name and find its circuit anew."
            )
        if name in circuits:  # a second one of the task is named after its folder
            name = "-".join(path.parent.relative_to(folder).parts)
        circuits[name] = circuit
    summary = _json_of(saved / SUMMARY_NAME)
    evaluation = _json_of(saved / SCORES_NAME)
    scores = []
    if evaluation.get("model_fingerprint") == model_fingerprint(model):
        scores = [TaskScore(**score) for score in evaluation["tasks"]]
    return Run(model, tokenizer, circuits, summary, scores)


def _json_of(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def parts_of(run: Run, repo: str, *, tasks: Sequence[str] | None, reference: Any) -> list[Part]:
    """The repositories to make, in the order in which they name each other.

    Args:
        run: what is published.
        repo: `user/name` of the model; the other names begin with it.
        tasks: which to publish as datasets, as for [`load_task`]; those of the circuits if None.
        reference: text for the viewer's examples; see [`write_report`].
    """
    of_circuits = {circuit.task: circuit for circuit in run.circuits.values()}
    if tasks is None:
        built_in = set(list_tasks())
        tasks = sorted(n for n, c in of_circuits.items() if c.own_task or n in built_in)
    datasets = [f"{repo}-tasks"] if tasks else []

    def model(folder: Path, commit: str) -> None:
        if isinstance(run.model, SparsePreTrainedModel):
            save_nonzeros(run.model, folder)
            fields = {}
        else:
            run.model.save_pretrained(folder)  # dense, so that transformers alone reads it
            fields = {"license": None}  # which is not ours to say
        run.tokenizer.save_pretrained(folder)
        card = model_card(
            run.model, repo_id=repo, summary=run.summary, task_scores=list(map(asdict, run.scores)),
            circuits={f"{repo}-circuits/{n}": c.to_dict() for n, c in run.circuits.items()},
            datasets=datasets, **fields,
        )  # fmt: skip
        card.save(folder / "README.md")

    def circuits(folder: Path, commit: str) -> None:
        named = {}
        for name, circuit in run.circuits.items():
            named[name] = _of_model(circuit, repo, commit)
            named[name].save_pretrained(folder / name)
            plot_circuit(named[name], folder / name / PICTURE_NAME, run.model, run.tokenizer)
        card = circuit_card(
            {name: circuit.to_dict() for name, circuit in named.items()},
            repo_id=f"{repo}-circuits",
            pictures=named,
            datasets=datasets,
        )
        card.save(folder / "README.md")

    def task_files(folder: Path, commit: str) -> None:
        built = [
            of_circuits[name].load_task(run.tokenizer)
            if name in of_circuits and of_circuits[name].own_task
            else load_task(name, run.tokenizer, **ROWS)
            for name in tasks
        ]
        write_task_datasets(
            folder,
            {task.name: DatasetDict({"train": task.train, "test": task.test}) for task in built},
            {task.name: task.description for task in built if task.text is not None},
            repo_id=f"{repo}-tasks",
            tokenizer=repo,
            seed=0,
        )

    def viewer(folder: Path, commit: str) -> None:
        circuits = {name: _of_model(run.circuits[name], repo, commit) for name in shown}
        _lay_out_viewer(folder, run, repo, circuits, reference)

    if run.circuits:
        check_can_draw()
    shown = [name for name, circuit in run.circuits.items() if len(circuit)]
    parts = [Part("model", "model", repo, model)]
    if run.circuits:
        parts.append(Part("circuits", "model", f"{repo}-circuits", circuits))
    if tasks:
        parts.append(Part("tasks", "dataset", f"{repo}-tasks", task_files))
    if shown:
        parts.append(Part("viewer", "space", f"{repo}-viewer", viewer))
    return parts


def _of_model(circuit: Circuit, name: str, commit: str) -> Circuit:
    return replace(circuit, model_name=name, model_revision=commit)


def _lay_out_viewer(
    folder: Path, run: Run, repo: str, circuits: Mapping[str, Circuit], reference: Any
) -> None:
    """Write a static Space: a page per circuit, and an index if there are several."""
    pages = {name: f"{name}.html" for name in circuits}
    if len(pages) == 1:
        pages = dict.fromkeys(pages, "index.html")
    for name, page in pages.items():
        write_report(
            circuits[name], folder / page, run.model, run.tokenizer, reference=reference,
            config=REPORT, progress=on_terminal(),
        )  # fmt: skip
    if len(pages) > 1:
        template = files("hf_circuit_sparsity.circuits.viewer") / "assets" / "circuits.html"
        environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        page = environment.from_string(template.read_text(encoding="utf-8")).render(
            title=f"Circuits of {repo}", circuits=circuits, pages=pages
        )
        (folder / "index.html").write_text(page, encoding="utf-8")
    data = SpaceCardData(
        title=f"{repo}-viewer".split("/")[1], emoji="🔌", colorFrom="gray", colorTo="green",
        sdk="static", app_file="index.html", license="apache-2.0",
        models=[repo, f"{repo}-circuits"], tags=["circuit", "hf-circuit-sparsity"],
    )  # fmt: skip
    text = f"# Circuits of {repo}\n\nWhat each does, on a page that needs no server.\n"
    SpaceCard(f"---\n{data.to_yaml()}\n---\n\n{text}").save(folder / "README.md")
