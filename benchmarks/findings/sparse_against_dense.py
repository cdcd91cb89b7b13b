"""Circuits of a sparse and of a dense model of equal pretraining loss (Gao et al. 2025, Figure 2).

Same data, architecture and tokenizer; the dense model stops at the sparse one's validation loss.
Of the tasks that both learned: nodes and edges of the smallest circuit found, their geometric
means and ratios. What differs between the two models beside the density of their weights: the
dense one has no AbsTopK, so its activations are dense too, and it was trained for fewer tokens
with a schedule of its own. Their losses on a task are not equal either. So a ratio is of two
recipes, not of sparsity alone.

Every task is compared at one target: the lowest of those tried that circuits of both models reach
on the prompts they are selected on. Both models are searched alike.
"""

from pathlib import Path
from typing import Any

from ..experiment import Experiment, table
from .findings import (
    SEARCHES,
    TARGETS,
    edges_mean,
    frontier,
    learned_tasks,
    lowest_common_target,
    main,
    model_row,
    smallest,
    stored_tasks,
)
from .trained_models import training_summary

SPARSE, DENSE = "topk-128-seed0", "dense-128-seed0"
# The last is made where it is not there; the other counts where it was made on both models.
SEARCHED = ("quick", "dear")
# Whether other searches find smaller dense circuits.
CHECKED = (*SEARCHED, "dear, twice the updates")
Rows = dict[str, dict[str, list[dict[str, Any]]]]
"""Model → task → circuits."""


def run(experiment: Experiment) -> str:
    """Train, prune and compare what is not there yet; returns the report."""
    folder = experiment.folder
    learned = {name: set(learned_tasks(name, folder, TARGETS[-1])) for name in (SPARSE, DENSE)}
    tasks = sorted(learned[SPARSE] & learned[DENSE])
    alone = {name: ", ".join(sorted(learned[name] - set(tasks))) or "none" for name in learned}
    if not experiment.stored_only:
        for name in learned:
            for task in tasks:
                frontier(name, task, folder, search=SEARCHED[-1])
    searches = {
        task: [s for s in SEARCHED if stored_tasks((SPARSE, DENSE), [task], folder, s)]
        for task in tasks
    }
    rows: Rows = {
        name: {
            task: [row for s in found for row in frontier(name, task, folder, search=s)]
            for task, found in searches.items()
        }
        for name in learned
    }
    missing = [task for task in tasks if not searches[task]]
    targets = {t: lowest_common_target([rows[name][t] for name in rows]) for t in tasks}
    beyond = [t for t in tasks if t not in missing and targets[t] is None]
    tasks = [t for t in tasks if t not in missing + beyond]
    search = SEARCHES[SEARCHED[-1]]
    kinds = "; ".join(
        f"{c.max_steps} at {c.node_penalty:g} nats per node for {', '.join(ts)}"
        for s in SEARCHED
        if (ts := [t for t in tasks if s in searches[t]])
        for c in [SEARCHES[s]]
    )
    models = [
        {**model_row(name, folder), "tokens": f"{training_summary(name, folder)['tokens']:,}"}
        for name in rows
    ]
    parts = [
        "# Sparse against dense at equal pretraining loss",
        *__doc__.strip().split("\n\n")[1:],
        table(models),
        "At the lowest target loss, of those tried, that both models reach on the prompts circuits "
        "are selected on:",
        _by_task({task: targets[task] for task in tasks}, rows),
        "Geometric means over the tasks of which both models reach the target:",
        _by_target(experiment, tasks, rows),
        "Have the masks of the dense model converged? Its smallest circuits by search:",
        _convergence(tasks, folder),
        f"Learned by the sparse model alone: {alone[SPARSE]}. By the dense model alone: "
        f"{alone[DENSE]}. (Learned: a loss of at most {TARGETS[-1] * search.selection_margin:g} on "
        f"held-out prompts, calibrated.) Mask updates, {search.seeds} seeds each: {kinds}. The "
        "smallest circuit counts; edges are the nonzero weights between kept nodes.",
    ]
    if beyond:
        parts.append(f"No common target, on training prompts: {', '.join(beyond)}.")
    if missing:
        parts.append(f"Not looked at yet: {', '.join(missing)}.")
    return "\n\n".join(parts)


def _by_task(targets: dict[str, float], rows: Rows) -> str:
    lines: list[dict[str, object]] = []
    best: dict[str, dict[str, list[float]]] = {
        size: {SPARSE: [], DENSE: []} for size in ("nodes", "edges")
    }
    for task, target in targets.items():
        line: dict[str, object] = {"task": task, "target loss": f"{target:g}"}
        for name, side in ((SPARSE, "sparse"), (DENSE, "dense")):
            row = smallest(rows[name][task], target)
            every = [str(r["edges"]) for r in rows[name][task] if r["target"] == target]
            for size in best:
                best[size][name].append(max(1, row[size]))
            line[f"{side}: nodes"] = row["nodes"]
            line[f"{side}: edges (every search)"] = f"{row['edges']} ({', '.join(every)})"
            line[f"{side}: held-out loss"] = f"{row['circuit_loss']:.3f}"
        for size, sides in best.items():
            line[f"{size}, dense / sparse"] = f"{sides[DENSE][-1] / sides[SPARSE][-1]:.1f} ×"
        lines.append(line)
    if lines:
        means = {size: {n: edges_mean(v) for n, v in sides.items()} for size, sides in best.items()}
        last = {"task": "geometric mean"}
        for name, side in ((SPARSE, "sparse"), (DENSE, "dense")):
            last[f"{side}: nodes"] = f"{means['nodes'][name]:.1f}"
            last[f"{side}: edges (every search)"] = f"{means['edges'][name]:.1f}"
        for size, sides in means.items():
            last[f"{size}, dense / sparse"] = f"{sides[DENSE] / sides[SPARSE]:.1f} ×"
        lines.append({name: f"**{last[name]}**" if name in last else "" for name in lines[0]})
    return table(lines)


def _by_target(experiment: Experiment, tasks: list[str], rows: Rows) -> str:
    lines = []
    curves: dict[str, list[float]] = {SPARSE: [], DENSE: []}
    for target in TARGETS:
        reached = [t for t in tasks if all(smallest(rows[n][t], target) for n in curves)]
        for name in curves:
            curves[name].append(
                edges_mean([smallest(rows[name][task], target)["edges"] for task in reached])
            )
        sparse, dense = curves[SPARSE][-1], curves[DENSE][-1]
        lines.append(
            {
                "target loss": f"{target:g}",
                "tasks": len(reached),
                "sparse: edges": f"{sparse:.1f}",
                "dense: edges": f"{dense:.1f}",
                "dense / sparse": f"{dense / sparse:.1f} ×",
            }
        )

    def draw(axes: Any) -> None:
        for name, colour, label in ((SPARSE, "C0", "sparse"), (DENSE, "C3", "dense")):
            for task in tasks:
                at = [(t, smallest(rows[name][task], t)) for t in TARGETS]
                points = [(t, max(1, row["edges"])) for t, row in at if row]
                axes.plot(*zip(*points, strict=True), f"{colour}.-", linewidth=0.7, alpha=0.4)
            axes.plot(TARGETS, curves[name], f"{colour}-o", label=f"{label}, geometric mean")
        axes.set(yscale="log", xlabel="target loss (nats; guessing is 0.69)", ylabel="edges")
        axes.set_title(
            "Circuits at equal pretraining loss\n(means over the "
            f"{', '.join(str(line['tasks']) for line in lines)} tasks whose circuits in both "
            "models reach it)",
            fontsize="medium",
        )
        axes.legend()

    return table(lines) + "\n\n" + experiment.picture(draw, "Edges against target loss")


def _convergence(tasks: list[str], folder: Path) -> str:
    lines = []
    for task in tasks:
        for search in CHECKED:
            if not stored_tasks([DENSE], [task], folder, search):
                continue
            config, found = SEARCHES[search], frontier(DENSE, task, folder, search=search)
            line = {
                "task": task,
                "updates": config.max_steps,
                "nats per node": f"{config.node_penalty:g}",
            }
            for target in TARGETS:
                row = smallest(found, target)
                line[f"edges at {target:g}"] = row["edges"] if row else "–"
            lines.append(line)
    return table(lines)


if __name__ == "__main__":
    main(run, __doc__, "sparse_against_dense")
