"""The quickstart from several seeds: what each of its runs took, found and may be believed.

    python -m benchmarks.findings.quickstart_seeds --folder runs/quickstart_seeds --seeds 0 1 2 3 4

Each seed runs in a process of its own, all at once: seconds by the clock mean something where there
are cores for all of them. A seed's numbers are in `FOLDER/seed-N/summary.json`, what it printed in
`FOLDER/seed-N.log`. In every model a circuit is also searched for without distractors, in
`FOLDER/seed-N/plain`. What is done is not run again.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from hf_circuit_sparsity.circuits.circuit import Circuit
from hf_circuit_sparsity.circuits.evaluation.verification import verify_circuit
from hf_circuit_sparsity.circuits.pruning.config import PruningConfig
from hf_circuit_sparsity.circuits.pruning.find import find_circuit
from hf_circuit_sparsity.commands.console import say
from hf_circuit_sparsity.commands.quickstart import BLOCK_SIZE, QUICK_CHECKS, SEARCH
from hf_circuit_sparsity.modeling.modeling_circuitgpt import CircuitGPTForCausalLM
from hf_circuit_sparsity.tasks.load import load_task

from ..experiment import Experiment, machine, table

# Nodes that can be read at a glance.
SMALL = 15
PLAIN = "plain"
PARTS = ("reading", "training", "circuit", "checks", "total")


def run_all(folder: Path, seeds: tuple[int, ...], threads: int) -> None:
    """Run the quickstarts that are not done; those that fail are named when all have ended."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    running = {}
    for seed in seeds:
        output = folder / f"seed-{seed}"
        if (output / "summary.json").is_file():
            continue
        command = [sys.executable, "-m", "hf_circuit_sparsity.cli", "quickstart"]
        command += ["--output-dir", str(output), "--seed", str(seed)]
        with (folder / f"seed-{seed}.log").open("w", encoding="utf-8") as log:
            running[seed] = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment
            )
    for seed in [seed for seed, process in running.items() if process.wait()]:
        print(f"Seed {seed} failed; {folder}/seed-{seed}.log says why.", file=sys.stderr)


def search_without_distractors(folder: Path, seed: int) -> None:
    """Find and check a circuit of a seed's model as the quickstart did, but without distractors."""
    found = Circuit.from_pretrained(folder / f"seed-{seed}" / "circuit")
    path = folder / f"seed-{seed}" / "model"
    model = CircuitGPTForCausalLM.from_pretrained(path).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    task = load_task(found.task, tokenizer, seed=seed, max_length=BLOCK_SIZE)
    config = PruningConfig(seed=seed, target_loss=found.config["target_loss"], **SEARCH)
    say(f"Seed {seed}, without distractors")
    circuit = find_circuit(model, task, config, progress=False)
    verify_circuit(circuit, model, task, others=[], progress=False, **QUICK_CHECKS)
    circuit.save_pretrained(folder / f"seed-{seed}" / PLAIN)


def row(folder: Path, seed: int, which: str = "circuit") -> dict[str, Any]:
    """What is reported of one seed."""
    summary = json.loads((folder / f"seed-{seed}" / "summary.json").read_text(encoding="utf-8"))
    circuit = Circuit.from_pretrained(folder / f"seed-{seed}" / which)
    summary |= circuit.metrics
    bounded = {name: c for name, c in circuit.verification.items() if "threshold" in c}
    passed = [name for name, check in bounded.items() if check["passed"]]

    def of(name: str) -> str:
        check = circuit.verification.get(name)
        return "–" if check is None else f"{check['value']:.0%}"

    return {
        "seed": seed,
        "validation loss": f"{summary['loss']:.2f}",
        "task loss, model": f"{summary['calibrated_model_loss']:.3f}",
        "right": f"{summary['model_accuracy']:.0%}",
        "nodes": summary["nodes"],
        "edges": summary["edges"],
        "target": circuit.config["target_loss"],
        "loss alone": round(summary["circuit_loss"], 3),
        "right alone": f"{summary['circuit_accuracy']:.0%}",
        "model right, other before": of("model accuracy: other_answer_before"),
        "circuit right, other before": of("accuracy: other_answer_before"),
        "checks passed": f"{len(passed)} of {len(bounded)}",
        "failed": ", ".join(name for name in bounded if name not in passed),
        **{f"{part}, CPU s": round(summary[f"{part}_cpu_seconds"]) for part in PARTS},
        "total, clock s": round(summary["total_seconds"]),
    }


def run(experiment: Experiment) -> str:
    folder, seeds = experiment.folder, tuple(experiment.options.seeds)
    if not experiment.stored_only:
        run_all(folder, seeds, experiment.options.threads)
    done = [seed for seed in seeds if (folder / f"seed-{seed}" / "summary.json").is_file()]
    missing = ", ".join(str(seed) for seed in seeds if seed not in done)
    if not done:
        raise RuntimeError(f"No seed of {seeds} ended in {folder}; the logs there say why.")
    for seed in done if not experiment.stored_only else ():
        if not (folder / f"seed-{seed}" / PLAIN).is_dir():
            search_without_distractors(folder, seed)
    rows = [row(folder, seed) for seed in done]
    plain = [row(folder, s, PLAIN) for s in done if (folder / f"seed-{s}" / PLAIN).is_dir()]
    small = [r for r in rows if r["nodes"] <= SMALL]
    reached = [r for r in rows if r["loss alone"] <= r["target"]]
    whole = [r for r in rows if not r["failed"] and r["checks passed"] != "0 of 0"]
    names = list(rows[0])
    at = names.index("failed")
    found, took = names[1:at], names[at + 1 :]
    lines = [
        "# The quickstart from several seeds",
        f"`make quickstart` with each of {len(seeds)} seeds, in processes of their own, on "
        f"{machine()}, {experiment.options.threads} thread(s) each.",
        *([f"Without a circuit: seed {missing}."] if missing else []),
        f"{len(small)} of {len(rows)} circuits have at most {SMALL} nodes; {len(reached)} reach on "
        f"held-out prompts the loss that they were searched for; {len(whole)} pass every check.",
        table([{n: r[n] for n in ("seed", *found)} for r in rows]),
        "*Other before*: on the line before stands a finished string in the other quote. Losses "
        "are on held-out prompts, with the logits calibrated as the whole model's. The checks that "
        "each circuit failed:",
        table([{n: r[n] for n in ("seed", "failed")} for r in rows]),
        "The same search in the same models without distractors:",
        table([{n: r[n] for n in ("seed", *found, "failed")} for r in plain]),
        "What it took:",
        table([{n: r[n] for n in ("seed", *took)} for r in rows]),
    ]
    return "\n\n".join(lines)


if __name__ == "__main__":
    Experiment.main(
        run, __doc__, "quickstart_seeds", "runs/quickstart_seeds", seeds=(0, 1, 2, 3, 4), threads=1
    )
