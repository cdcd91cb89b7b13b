"""Circuits of a sparse and of a dense model of equal pretraining loss (Gao et al. 2025, Figure 2).

Same data, architecture and tokenizer; the dense model stops at the sparse one's validation loss. Of
the tasks that both learned: edges of the smallest circuit found, their geometric mean and ratio.

Every task is compared at one target: the lowest of those tried that circuits of both models reach
on the prompts they are selected on. Both models are searched alike.
"""

from pathlib import Path

from ..speed.measure import save_figure, table
from .findings import (
    RESULTS,
    SEARCHES,
    TARGETS,
    arguments,
    edges_mean,
    frontier,
    learned_tasks,
    lowest_common_target,
    smallest,
    stored_tasks,
    task_losses,
    write_report,
)
from .trained_models import FOLDER, RECIPES, training_summary

SPARSE, DENSE = "topk-128-seed0", "dense-128-seed0"
# The last is made where it is not there; the other counts where it was made on both models.
SEARCHED = ("quick", "dear")
# Whether other searches find smaller dense circuits.
CHECKED = (*SEARCHED, "dear, twice the updates")


def run(folder: Path = FOLDER, results: Path = RESULTS, stored_only: bool = False) -> str:
    """Train, prune and compare what is not there yet; returns the report."""
    learned = {name: set(learned_tasks(name, folder, TARGETS[-1])) for name in (SPARSE, DENSE)}
    tasks = sorted(learned[SPARSE] & learned[DENSE])
    alone = {name: sorted(learned[name] - set(tasks)) for name in learned}
    if not stored_only:
        for name in learned:
            for task in tasks:
                frontier(name, task, folder, search=SEARCHED[-1])
    searches = {
        task: [s for s in SEARCHED if stored_tasks((SPARSE, DENSE), [task], folder, s)]
        for task in tasks
    }
    missing = [task for task in tasks if not searches[task]]
    rows = {
        name: {
            task: [row for s in found for row in frontier(name, task, folder, search=s)]
            for task, found in searches.items()
        }
        for name in learned
    }
    beyond = [t for t in tasks if t not in missing and _target(t, rows) is None]
    tasks = [t for t in tasks if t not in missing + beyond]
    parts = ["# Sparse against dense at equal pretraining loss", *__doc__.strip().split("\n\n")[1:]]
    parts.append(_models(folder))
    parts.append(_by_task(tasks, rows))
    parts.append(_by_target(tasks, rows, results))
    parts.append(_convergence(tasks, folder))
    margin = SEARCHES[SEARCHED[-1]].selection_margin
    kinds = "; ".join(
        f"{c.steps} at {c.k_coef:g} nats per node for {', '.join(ts)}"
        for s in SEARCHED
        if (ts := [t for t in tasks if s in searches[t]])
        for c in [SEARCHES[s]]
    )
    parts.append(
        f"Learned by the sparse model alone: {', '.join(alone[SPARSE]) or 'none'}. "
        f"By the dense model alone: {', '.join(alone[DENSE]) or 'none'}. (Learned: a loss of at "
        f"most {TARGETS[-1] * margin:g} on held-out prompts, calibrated.) Mask updates, "
        f"{SEARCHES[SEARCHED[-1]].seeds} seeds each: {kinds}. The smallest circuit counts; edges "
        "are the nonzero weights between kept nodes."
    )
    if beyond:
        parts.append(f"No common target, on training prompts: {', '.join(beyond)}.")
    if missing:
        parts.append(f"Not looked at yet: {', '.join(missing)}.")
    return "\n\n".join(parts)


def _models(folder: Path) -> str:
    lines = []
    for name in (SPARSE, DENSE):
        summary = training_summary(name, folder)
        scores = task_losses(name, folder)
        mean = sum(s["calibrated_loss"] for s in scores.values()) / len(scores)
        lines.append(
            (
                name,
                RECIPES[name].d_model,
                f"{summary['loss']:.3f}",
                f"{summary['nonzeros']:,}",
                f"{summary['tokens']:,}",
                f"{mean:.3f}",
            )
        )
    header = ("model", "d_model", "validation loss", "nonzeros", "tokens", "mean task loss")
    return table(header, lines)


def _target(task: str, rows: dict) -> float | None:
    return lowest_common_target([by_task[task] for by_task in rows.values()])


def _by_task(tasks: list[str], rows: dict) -> str:
    lines = []
    best: dict[str, list[float]] = {SPARSE: [], DENSE: []}
    for task in tasks:
        target = _target(task, rows)
        cells = [task, f"{target:g}"]
        for name in (SPARSE, DENSE):
            row = smallest(rows[name][task], target)
            every = [r["edges"] for r in rows[name][task] if r["target"] == target]
            best[name].append(row["edges"])
            cells += [row["nodes"], f"{row['edges']} ({', '.join(map(str, every))})"]
            cells.append(f"{row['circuit_loss']:.3f}")
        ratio = max(1, best[DENSE][-1]) / max(1, best[SPARSE][-1])
        lines.append((*cells, f"{ratio:.1f} ×"))
    means = {name: edges_mean(edges) for name, edges in best.items()}
    ratio = means[DENSE] / means[SPARSE]
    lines.append(
        ("**geometric mean**", "", "", f"**{means[SPARSE]:.1f}**", "", "",
         f"**{means[DENSE]:.1f}**", "", f"**{ratio:.1f} ×**")
    )  # fmt: skip
    header = (
        "task", "target loss", "sparse: nodes", "edges (every search)", "held-out loss",
        "dense: nodes", "edges (every search)", "held-out loss", "dense / sparse",
    )  # fmt: skip
    return (
        "At the lowest target loss, of those tried, that both models reach on the prompts circuits "
        "are selected on:\n\n" + table(header, lines)
    )


def _by_target(tasks: list[str], rows: dict, results: Path) -> str:
    lines = []
    curves: dict[str, list[float]] = {SPARSE: [], DENSE: []}
    for target in TARGETS:
        reached = [t for t in tasks if all(smallest(rows[n][t], target) for n in curves)]
        for name in curves:
            curves[name].append(
                edges_mean([smallest(rows[name][task], target)["edges"] for task in reached])
            )
        sparse, dense = curves[SPARSE][-1], curves[DENSE][-1]
        ratio = f"{dense / sparse:.1f} ×"
        lines.append((f"{target:g}", len(reached), f"{sparse:.1f}", f"{dense:.1f}", ratio))
    _draw(tasks, rows, curves, results / "sparse_against_dense.png")
    header = ("target loss", "tasks", "sparse: edges", "dense: edges", "dense / sparse")
    return (
        "Geometric means over the tasks of which both models reach the target:\n\n"
        + table(header, lines)
        + "\n\n![Edges against target loss](sparse_against_dense.png)"
    )


def _convergence(tasks: list[str], folder: Path) -> str:
    lines = []
    for task in tasks:
        for search in CHECKED:
            if not stored_tasks([DENSE], [task], folder, search):
                continue
            config, found = SEARCHES[search], frontier(DENSE, task, folder, search=search)
            best = [smallest(found, target) for target in TARGETS]
            sizes = [str(row["edges"]) if row else "–" for row in best]
            lines.append((task, config.steps, f"{config.k_coef:g}", *sizes))
    header = ("task", "updates", "nats per node", *(f"edges at {t:g}" for t in TARGETS))
    return (
        "Have the masks of the dense model converged? Its smallest circuits by search:\n\n"
        + table(header, lines)
    )


def _draw(tasks: list[str], rows: dict, curves: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5.5, 4), layout="constrained")
    for name, colour, label in ((SPARSE, "C0", "sparse"), (DENSE, "C3", "dense")):
        for task in tasks:
            at = [(t, smallest(rows[name][task], t)) for t in TARGETS]
            points = [(t, max(1, row["edges"])) for t, row in at if row]
            axes.plot(*zip(*points, strict=True), f"{colour}.-", linewidth=0.7, alpha=0.4)
        axes.plot(TARGETS, curves[name], f"{colour}-o", label=f"{label}, geometric mean")
    axes.set(yscale="log", xlabel="target loss (nats; guessing is 0.69)", ylabel="edges in circuit")
    reached = (
        sum(all(smallest(by_task[task], t) for by_task in rows.values()) for task in tasks)
        for t in TARGETS
    )
    axes.set_title(
        f"Circuits at equal pretraining loss\n(means over the {', '.join(map(str, reached))} tasks "
        "whose circuits in both models reach it)",
        fontsize="medium",
    )
    axes.legend()
    save_figure(figure, path)
    pyplot.close(figure)


if __name__ == "__main__":
    args = arguments(__doc__)
    write_report(
        args.results, "sparse_against_dense", run(args.folder, args.results, args.stored_only)
    )
