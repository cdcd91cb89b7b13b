"""Width at a fixed number of nonzeros: capability and size of circuits (Gao et al. 2025, Figure 3).

Models of several widths with as many nonzeros among their sparse weights, trained alike.
"""

import math
from pathlib import Path

from ..speed.measure import save_figure, table
from .findings import (
    COMPARED,
    CONFIG,
    RESULTS,
    arguments,
    edges_mean,
    frontier,
    learned_tasks,
    smallest,
    stored_tasks,
    task_losses,
    write_report,
)
from .trained_models import FOLDER, RECIPES, training_summary

MODELS = ("topk-32-seed0", "topk-64-seed0", "topk-128-seed0", "topk-256-seed0")


def run(folder: Path = FOLDER, results: Path = RESULTS, stored_only: bool = False) -> str:
    """Measure those of `MODELS` that are trained (at least three); returns the report."""
    names = [name for name in MODELS if training_summary(name, folder)]
    if len(names) < 3:
        names = list(MODELS[:3])
    learned = {name: learned_tasks(name, folder) for name in names}
    shared = sorted(t for t in set().union(*learned.values()) if _learners(t, learned) > 1)
    missing: list[str] = []
    rows: dict[str, dict[str, list]] = {name: {} for name in names}
    for name in names:
        wanted = [task for task in shared if task in learned[name]]
        stored = stored_tasks([name], wanted, folder) if stored_only else wanted
        missing += [f"{task} at d_model {RECIPES[name].d_model}" for task in wanted
                    if task not in stored]  # fmt: skip
        rows[name] = {task: frontier(name, task, folder) for task in stored}
    target = COMPARED
    best = {
        name: {t: row for t, found in rows[name].items() if (row := smallest(found, target))}
        for name in names
    }
    common = [t for t in shared if all(t in best[name] for name in names)]
    wider = [t for t in shared if all(t in best[name] for name in names[1:])]
    lines, points = [], []
    for name in names:
        summary = training_summary(name, folder)
        scores = task_losses(name, folder)
        mean = sum(s["calibrated_loss"] for s in scores.values()) / len(scores)
        edges = edges_mean([best[name][t]["edges"] for t in common])
        all_wider = "–"
        if name != names[0]:
            mean_wider = edges_mean([best[name][t]["edges"] for t in wider])
            all_wider = f"{mean_wider:.1f}"
            points.append((RECIPES[name].d_model, summary["loss"], mean_wider))
        lines.append(
            (
                RECIPES[name].d_model,
                f"{RECIPES[name].density:.4f}",
                f"{summary['nonzeros']:,}",
                f"{summary['loss']:.3f}",
                f"{mean:.3f}",
                len(learned[name]),
                f"{edges:.1f}",
                all_wider,
            )
        )
    _draw(points, results / "width_frontier.png")
    header = (
        "d_model", "density", "nonzeros", "validation loss", "mean task loss", "tasks learned",
        f"edges, geometric mean over the {len(common)} all learned",
        f"over the {len(wider)} all but the narrowest learned",
    )  # fmt: skip
    by_task = [
        (task, *(best[name][task]["edges"] if task in best[name] else "–" for name in names))
        for task in shared
    ]
    return "\n\n".join(
        [
            "# Width at a fixed number of nonzeros",
            __doc__.split("\n\n")[1] + " One training run each.",
            table(header, lines),
            "![Validation loss and edges against width](width_frontier.png)",
            f"Edges of the smallest circuit at a target loss of {target:g}, {CONFIG.seeds} pruning "
            "seeds, on the tasks that two widths or more learned:",
            table(("task", *(f"d_model {RECIPES[n].d_model}" for n in names)), by_task),
            "Learned: "
            + "; ".join(f"d_model {RECIPES[n].d_model}: {', '.join(learned[n])}" for n in names)
            + "."
            + (f" Not looked at yet: {', '.join(missing)}." if missing else ""),
        ]
    )


def _learners(task: str, learned: dict[str, list[str]]) -> int:
    """How many models learned a task."""
    return sum(task in tasks for tasks in learned.values())


def _draw(points: list[tuple[int, float, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 4), layout="constrained")
    losses = [loss for _, loss, _ in points]
    edges = [size for _, _, size in points]
    axes.plot(edges, losses, "C0-o")
    for width, loss, size in points:
        if math.isfinite(size):
            axes.annotate(
                f"d_model {width}",
                (size, loss),
                xytext=(0, 9),
                textcoords="offset points",
                ha="center",
            )
    axes.set(
        xlabel="edges in circuit, geometric mean over shared tasks",
        ylabel="validation loss, nats (lower is better)",
        title="Width at a fixed number of nonzeros",
    )
    axes.margins(0.2)
    save_figure(figure, path)
    pyplot.close(figure)


if __name__ == "__main__":
    args = arguments(__doc__)
    write_report(args.results, "width_frontier", run(args.folder, args.results, args.stored_only))
