"""The quickstart over seeds: its circuits, which checks they pass, and how long it takes.

Every seed is a quickstart of its own, in a process of its own, as its command runs it; the seed is
of tasks, model, training and search. CPU seconds are of all threads of a process.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hf_circuit_sparsity.circuits.circuit import Circuit

from ..experiment import Experiment, machine, spread, table


def run(experiment: Experiment) -> str:
    """Run the quickstarts that are not there yet; returns the report."""
    o, folder = experiment.options, experiment.folder
    if not experiment.stored_only:
        with ThreadPoolExecutor(o.workers) as pool:
            list(pool.map(lambda seed: quickstart(folder / str(seed), seed, o.threads), o.seeds))
    rows = [row_of(folder / str(seed), seed) for seed in o.seeds if finished(folder / str(seed))]
    failed = Counter(name for row in rows for name in row["failed"])
    return "\n\n".join([
        "# The quickstart over seeds",
        __doc__.strip().split("\n\n", 1)[1],
        f"Measured on: {machine()}; {o.threads} thread(s) per process.",
        table([_cells(row) for row in rows]),
        table([_over(rows)]),
        "Checks not passed, and by how many: "
        + (", ".join(f"{name} ({n})" for name, n in failed.most_common()) or "none")
        + ".",
    ])  # fmt: skip


def finished(folder: Path) -> bool:
    """Whether a quickstart ended there."""
    return (folder / "summary.json").is_file()


def quickstart(folder: Path, seed: int, threads: int) -> None:
    """Run one, or go on with it."""
    if finished(folder):
        return
    command = [sys.executable, "-m", "hf_circuit_sparsity.cli", "quickstart"]
    command += ["--output-dir", str(folder), "--seed", str(seed)]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": str(threads)})


def row_of(folder: Path, seed: int) -> dict[str, Any]:
    """What one quickstart gave."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    circuit = Circuit.from_pretrained(folder / "circuit")
    checks = circuit.verification
    decided = {name: check["passed"] for name, check in checks.items() if "threshold" in check}
    return {
        **summary,
        "seed": seed,
        "target": circuit.config["target_loss"],
        "after_other": checks["accuracy: other_answer_before"]["value"],
        "checks": len(decided),
        "failed": [name for name, passed in decided.items() if not passed],
    }


def _cells(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "seed": row["seed"],
        "validation loss": f"{row['loss']:.3f}",
        "model right": f"{row['model_accuracy']:.1%}",
        "nodes": row["nodes"],
        "edges": row["edges"],
        "target": f"{row['target']:g}",
        "loss alone": f"{row['circuit_loss']:.3f}",
        "right alone": f"{row['circuit_accuracy']:.1%}",
        "right alone after a string of the other quote": f"{row['after_other']:.1%}",
        "checks passed": f"{row['checks'] - len(row['failed'])} of {row['checks']}",
        **{
            f"{part}, CPU s": f"{row[f'{part}_cpu_seconds']:.0f}"
            for part in ("reading", "training", "circuit", "checks", "total")
        },
    }


def _over(rows: list[dict[str, Any]]) -> dict[str, str]:
    def column(key: str) -> list[float]:
        return [float(row[key]) for row in rows]

    return {
        "seeds": str(len(rows)),
        "nodes": spread(column("nodes"), 1),
        "edges": spread(column("edges"), 1),
        "loss alone": spread(column("circuit_loss"), 3),
        "CPU minutes": spread([seconds / 60 for seconds in column("total_cpu_seconds")], 1),
        "minutes": spread([seconds / 60 for seconds in column("total_seconds")], 1),
        "pass all checks": str(sum(not row["failed"] for row in rows)),
        "at most 15 nodes": str(sum(row["nodes"] <= 15 for row in rows)),
    }


def main() -> None:
    """The command line."""
    Experiment.main(
        run, __doc__, "quickstart_seeds", "runs/quickstart_seeds", seeds=(0, 1, 2, 3, 4),
        threads=1, workers=2,
    )  # fmt: skip


if __name__ == "__main__":
    main()
