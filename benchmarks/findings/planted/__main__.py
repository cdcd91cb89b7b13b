"""Precision and recall of searches on planted mechanisms, of which the true nodes are known."""

import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from ...experiment import Experiment, grouped, machine, mean, spread, table
from .builder import ARCHITECTURES
from .mechanisms import MECHANISMS
from .searches import (
    CONTROL,
    METHODS,
    NOISES,
    archive,
    archived,
    cell_name,
    cell_path,
    cell_rows,
)


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
        measure_cells(
            [cell for cell in cells if cell_name(*cell) not in kept], experiment.folder, o.workers
        )
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


def measure_cells(cells: Sequence[tuple[Any, ...]], folder: Path, workers: int) -> None:
    """Store every cell's rows in the folder, by so many processes.

    More processes, not more threads: the models are too small for a second thread.
    """
    if workers == 1:
        for cell in cells:
            cell_rows(folder, *cell)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        waiting = [pool.submit(cell_rows, folder, *cell) for cell in cells]
        for done in as_completed(waiting):
            done.result()  # raises what the worker raised


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
