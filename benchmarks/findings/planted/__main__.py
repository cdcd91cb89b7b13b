"""Precision and recall of searches on planted mechanisms, of which the true nodes are known."""

import gzip
import json
import random
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from hf_circuit_sparsity.circuits.circuit import Circuit
from hf_circuit_sparsity.circuits.evaluation.verification import random_circuit
from hf_circuit_sparsity.circuits.pruning.config import PruningConfig
from hf_circuit_sparsity.circuits.pruning.find import TaskNotLearnedError, find_circuit
from hf_circuit_sparsity.circuits.task_scores import all_pair_logits, binary_accuracy
from hf_circuit_sparsity.files import replacing

from ...experiment import Experiment, grouped, machine, mean, spread, stored, table
from .builder import ARCHITECTURES
from .mechanisms import MECHANISMS, Nodes, Planted, plant

SHORT = PruningConfig(
    max_steps=60, batch_size=16, learning_rate=3e-2, node_penalty=3e-3, selection_prompts=96,
    screen_prompts=0,
)  # fmt: skip
METHODS: dict[str, PruningConfig] = {
    "rest off": SHORT,
    "rest random": replace(SHORT, outside="random"),
    "rest adversarial": replace(SHORT, outside="adversarial"),
    "interchange": replace(SHORT, interchange=1.0, interchange_depths=2),
    "zero": replace(SHORT, ablation="zero"),
    "task mean": replace(SHORT, ablation="task_mean"),
    "resample": replace(SHORT, ablation="resample"),
    "frozen norms": replace(SHORT, freeze_norms=True),
    "KL": replace(SHORT, objective="kl"),
    "no masks": replace(SHORT, max_steps=0),
}
"""The searches that are compared: name → settings. "rest off" is the paper's in a tenth of the
time; each other one differs from it in one setting. Without masks nodes are ranked at random, and
the clean-up, which goes by gradients, does all."""
CONTROL = "random"
ARCHIVE = "planted_runs.json.gz"
NOISES = (0.0, 0.01, 0.03)


def run(experiment: Experiment) -> str:
    """Measure what is not there yet; returns the report."""
    o = experiment.options
    cells = [
        (method, name, architecture, noise, seed)
        for seed in range(o.seeds) for method in o.methods for noise in o.noises
        for name in o.mechanisms for architecture in o.architectures
    ]  # fmt: skip
    rows, kept = [], archived(experiment.results)
    if not experiment.stored_only:
        missing = [cell for cell in cells if cell_name(*cell) not in kept]
        # More processes, not more threads: the models are too small for a second one.
        with ProcessPoolExecutor(o.workers, mp_context=get_context("spawn")) as pool:
            waiting = [pool.submit(cell_rows, experiment.folder, *cell) for cell in missing]
            for done in as_completed(waiting):
                done.result()  # raises what the worker raised
    for method, name, architecture, noise, seed in cells:
        cell = cell_name(method, name, architecture, noise, seed)
        if cell not in kept:
            path = cell_path(experiment.folder, cell)
            if not path.is_file():
                continue
            kept[cell] = json.loads(path.read_text(encoding="utf-8"))
        for row, which in zip(kept[cell], (method, CONTROL), strict=True):
            of = {"architecture": architecture, "noise": noise, "sized": method, "method": which}
            rows.append({**row, **of, "mechanism": name})
    archive(experiment.results, kept)
    return report(rows)


def cell_name(method: str, name: str, architecture: str, noise: float, seed: int) -> str:
    """What one run is called in the folder and in the archive."""
    return f"{method} {name} {architecture} {noise:g} {seed}"


def cell_path(folder: Path, cell: str) -> Path:
    """Where one run is stored until it is archived."""
    return folder / f"{cell}.json"


def cell_rows(folder: Path, method: str, *of: Any) -> list[dict[str, Any]]:
    """What one run measured, now or before. At module level, so that a worker can be sent it."""
    torch.set_num_threads(1)
    path = cell_path(folder, cell_name(method, *of))
    return stored(path, lambda: measured(METHODS[method], plant(*of), of[-1]))


def archived(results: Path) -> dict[str, list[dict[str, Any]]]:
    """What was measured on any machine and committed: cell → rows. It is not measured again."""
    path = results / ARCHIVE
    return json.loads(gzip.decompress(path.read_bytes())) if path.is_file() else {}


def archive(results: Path, kept: dict[str, list[dict[str, Any]]]) -> None:
    """Keep it beside the report; the same content gives the same bytes."""
    with replacing(results / ARCHIVE) as temporary:
        text = json.dumps(dict(sorted(kept.items())))
        temporary.write_bytes(gzip.compress(text.encode(), mtime=0))


def measured(config: PruningConfig, planted: Planted, seed: int) -> list[dict[str, Any]]:
    """What a search finds, and what a random circuit of as many nodes at every site is."""
    config = replace(config, seed=seed)
    try:
        found = find_circuit(
            planted.model, planted.task, config, reference=planted.reference, progress=False
        )
    except TaskNotLearnedError:
        return [{"refused": True}] * 2
    drawn = random.Random(f"{planted.name} {seed}").randrange(2**32)
    generator = torch.Generator().manual_seed(drawn)
    return [score(planted, found), score(planted, random_circuit(found, generator))]


def score(planted: Planted, circuit: Circuit) -> dict[str, Any]:
    """A circuit beside the truth.

    Returns:
        `precision` and `recall` of nodes; `nodes`; `decoys` among them; `accuracy` alone, on
        held-out prompts; `turned`: share of the whole model's answers that change when the
        circuit's nodes are swapped from the counterfactual.
    """
    nodes: Nodes = frozenset((site, i) for site, ids in circuit.nodes.items() for i in ids)
    precision, recall = planted.truth.precision_and_recall(nodes)
    test = planted.task.tensors("test")
    with circuit.apply(planted.model):
        alone = all_pair_logits(planted.model, test)
    whole, swapped = all_pair_logits(planted.model, test), planted.swapped(nodes)
    turned = ((whole[:, 0] > whole[:, 1]) != (swapped[:, 0] > swapped[:, 1])).float().mean()
    return {
        "precision": precision,
        "recall": recall,
        "nodes": len(nodes),
        "decoys": len(nodes & planted.truth.decoys),
        "accuracy": binary_accuracy(alone),
        "turned": turned.item(),
    }


def report(rows: Sequence[dict[str, Any]]) -> str:
    """The tables, of rows with the keys of [`score`] and what they were measured on."""
    named = [{**row, "method": _method(row), "noise": f"{row['noise']:g}"} for row in rows]
    by_method = _table(named, "method")
    by_mechanism = _table(named, "mechanism", "method")
    by_noise = _table(named, "method", "architecture", "noise")
    return "\n\n".join([
        "# Searches on planted mechanisms", EXPLANATION, f"Measured on: {machine()}.",
        "Over everything:", by_method,
        "By mechanism, over architectures, noises and seeds:", by_mechanism,
        "By architecture and noise, over mechanisms and seeds:", by_noise,
    ])  # fmt: skip


EXPLANATION = """\
Every mechanism of `benchmarks/findings/planted/mechanisms.py` is written into the weights of a
CircuitGPT and of a Llama of two or three layers, d_model 32; all other weights are noise of the
standard deviation given. The seed draws the noise, where the mechanism lies, the prompts and what
the search draws. Precision: share of the nodes found that are the mechanism's. Recall: share of the
mechanism's nodes that are found. Where one of several sets suffices, the one counts that most was
found of, and the nodes of the others count neither for nor against. "exact" is the share of runs
with both at 1. Decoys are nodes that go with the answer, or cancel each other, and do not cause it.
"alone" is the accuracy with all else mean-ablated; "turned" the share of the whole model's answers
that change when the nodes found are swapped from the counterfactual: the mechanism itself turns
all. "random" has as many nodes at every site as the search before it. After ± is the standard
deviation over runs."""


def _method(row: dict[str, Any]) -> str:
    return row["method"] if row["method"] != CONTROL else f"{CONTROL}, as {row['sized']}"


def _table(rows: Sequence[dict[str, Any]], *keys: str) -> str:
    lines = []
    for group, members in grouped(rows, *keys).items():
        found = [row for row in members if "refused" not in row]
        line = dict(zip(keys, group, strict=True))
        line |= {"runs": len(members), "refused": len(members) - len(found)}
        for name in ("precision", "recall"):
            line[name] = spread([row[name] for row in found])
        exact = [float(row["precision"] == row["recall"] == 1) for row in found]
        line["exact"] = f"{mean(exact):.2f}" if found else "–"
        for name, title in (
            ("nodes", "nodes"), ("decoys", "decoys"), ("accuracy", "alone"), ("turned", "turned")
        ):  # fmt: skip
            line[title] = f"{mean([row[name] for row in found]):.2f}" if found else "–"
        lines.append(line)
    return table(lines)


def main() -> None:
    """The command line."""
    Experiment.main(
        run, __doc__, "planted", str(Path("runs") / "planted"), mechanisms=tuple(MECHANISMS),
        methods=tuple(METHODS), architectures=tuple(ARCHITECTURES), noises=NOISES, seeds=5,
        workers=1,
    )  # fmt: skip


if __name__ == "__main__":
    main()
