"""Loss against nodes and edges for one task, and the seconds it takes.

Masks of several seeds are learned together in one forward pass, and one after the other.
"""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hf_circuit_sparsity.circuits.ablation import mean_ablated
from hf_circuit_sparsity.circuits.pruning.find import find_circuits
from hf_circuit_sparsity.circuits.pruning.masks import learn_masks
from hf_circuit_sparsity.circuits.task_scores import all_pair_logits, binary_loss, fit_calibration

from ..experiment import Experiment, machine, stored, table
from .findings import SEARCHES, loaded, main, task_for

MODEL, TASK, SEARCH = "topk-128-seed0", "single_double_quote", "dear"
CONFIG = replace(SEARCHES[SEARCH], num_seeds=1)
TARGETS = (0.15, 0.2, 0.3, 0.4, 0.5, 0.6)
STEPS_TIMED = 15
SEEDS_TIMED = 3


def run(experiment: Experiment) -> str:
    """Find the circuits, time the parts, draw the picture; returns the report."""
    path = experiment.folder / "measured" / MODEL / "pruning_frontier.json"
    if experiment.stored_only and not path.is_file():
        return "# Loss against the size of the circuit\n\nNot measured yet."
    found = stored(path, lambda: _measured(experiment.folder))
    circuits, ranked, seconds = found["circuits"], found["ranked"], found["seconds"]
    rows = [
        {
            "target loss": f"{m['target']:g}",
            "nodes": m["nodes"],
            "edges": m["edges"],
            "loss, training prompts": f"{m['train_circuit_loss']:.3f}",
            "loss, held-out prompts": f"{m['circuit_loss']:.3f}",
        }
        for m in circuits
    ]
    pace = [
        {f"masks of {SEEDS_TIMED} seeds": how, "seconds per update and seed": f"{seconds[how]:.3f}"}
        for how in ("together", "one by one")
    ]

    def draw(both: Any) -> None:
        left, right = both
        losses = [m["train_circuit_loss"] for m in circuits]
        left.plot([k for k, _ in ranked], [v for _, v in ranked], "C7--o", label="by rank alone")
        for axes, what in ((left, "nodes"), (right, "edges")):
            axes.plot([max(1, m[what]) for m in circuits], losses, "C0-o", label="cleaned up")
            axes.axhline(0.693, color="C7", linewidth=0.8, linestyle=":")
            axes.set(xlabel=what)
            axes.legend()
        left.set_xscale("log")
        ticks = (5, 10, 20, 50, 100, 200, 400)
        left.set_xticks(ticks, map(str, ticks))
        left.minorticks_off()
        left.set_ylabel("task loss (nats), training prompts")
        left.figure.suptitle(f"{TASK}: loss against the size of the circuit")

    return "\n\n".join(
        [
            "# Loss against the size of the circuit",
            f"{MODEL}, {TASK}. {found['machine']}; CPU seconds.",
            table(rows),
            experiment.picture(
                draw, "Loss against nodes and edges", (8, 3.6), ncols=2, sharey=True
            ),
            "Before the clean-up, keeping the nodes of largest mask parameter:",
            table([{"nodes": k, "loss, training prompts": f"{v:.3f}"} for k, v in ranked]),
            f"All of it took {seconds['all']:.0f} s, of which the masks "
            f"{CONFIG.max_steps * seconds['one by one']:.0f} s ({CONFIG.max_steps} updates of "
            f"{CONFIG.batch_size} pairs, at the pace below), the rest bisection and clean-up on "
            f"{CONFIG.selection_prompts} prompts for {len(TARGETS)} targets.",
            table(pace),
        ]
    )


def _measured(folder: Path) -> dict[str, Any]:
    """Circuits at every target, losses by rank, and seconds; what the report is made of."""
    model, _, means = loaded(MODEL, folder)
    task = task_for(MODEL, TASK, folder, SEARCH)
    train = task.tensors("train")
    seconds: dict[str, float] = {}
    # One by one is what so little memory leaves; the first of the two rounds warms up.
    for how, memory in (("together", 64.0), ("together", 64.0), ("one by one", 1e-6)):
        start = time.process_time()
        config = replace(CONFIG, max_steps=STEPS_TIMED, memory_gb=memory)
        learn_masks(model, train, means.nodes, config, range(SEEDS_TIMED), progress=False)
        seconds[how] = (time.process_time() - start) / STEPS_TIMED / SEEDS_TIMED
    start = time.process_time()
    circuits = find_circuits(model, task, CONFIG, reference=means, targets=TARGETS)
    seconds["all"] = time.process_time() - start
    return {
        "machine": machine(),
        "seconds": seconds,
        "ranked": _by_rank(model, task, means, circuits[0].scores),
        "circuits": [
            {"target": target, **c.metrics} for target, c in zip(TARGETS, circuits, strict=True)
        ],
    }


def _by_rank(model: Any, task: Any, means: Any, scores: Any) -> list[tuple[int, float]]:
    """Nodes kept, in order of their mask parameters, and the calibrated loss."""
    rows = {k: v[: CONFIG.selection_prompts] for k, v in task.tensors("train").items()}
    order = torch.cat(list(scores.values())).argsort(descending=True)
    result = []
    for k in (5, 10, 15, 20, 30, 50, 100, 200, 400):
        flat = torch.zeros(len(order), dtype=torch.bool)
        flat[order[:k]] = True
        masks = dict(zip(scores, flat.split([len(s) for s in scores.values()]), strict=True))
        with mean_ablated(model, masks, means.nodes):
            pairs = all_pair_logits(model, rows)
        result.append((k, binary_loss(fit_calibration(pairs, rows).pairs(pairs, rows)).item()))
    return result


if __name__ == "__main__":
    main(run, __doc__, "pruning_frontier")
