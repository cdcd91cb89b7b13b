"""Width at a fixed number of nonzeros: capability and size of circuits (Gao et al. 2025, Figure 3).

Models of several widths with as many nonzeros among their sparse weights, trained alike.
"""

import math
from collections import Counter
from typing import Any

from ..experiment import Experiment, table
from .findings import (
    COMPARED,
    CONFIG,
    edges_mean,
    frontier,
    learned_tasks,
    main,
    model_row,
    smallest,
    stored_tasks,
)
from .trained_models import RECIPES, training_summary

MODELS = ("topk-32-seed0", "topk-64-seed0", "topk-128-seed0", "topk-256-seed0")


def run(experiment: Experiment) -> str:
    """Measure those of `MODELS` that are trained (at least three); returns the report."""
    folder = experiment.folder
    names = [name for name in MODELS if training_summary(name, folder)]
    if len(names) < 3:
        names = list(MODELS[:3])
    widths = {name: RECIPES[name].d_model for name in names}
    learned = {name: learned_tasks(name, folder) for name in names}
    columns = [f"d_model {width}" for width in widths.values()]
    learners = Counter(task for tasks in learned.values() for task in tasks)
    shared = sorted(task for task, count in learners.items() if count > 1)
    missing: list[str] = []
    best: dict[str, dict[str, dict[str, Any]]] = {}
    for name in names:
        tasks = [task for task in shared if task in learned[name]]
        measured = stored_tasks([name], tasks, folder) if experiment.stored_only else tasks
        missing += [f"{t} at d_model {widths[name]}" for t in tasks if t not in measured]
        found = {t: smallest(frontier(name, t, folder), COMPARED) for t in measured}
        best[name] = {task: row for task, row in found.items() if row}
    common = [t for t in shared if all(t in best[name] for name in names)]
    wider = [t for t in shared if all(t in best[name] for name in names[1:])]
    rows, points = [], []
    for name in names:
        mean_wider = math.nan
        if name != names[0]:
            mean_wider = edges_mean([best[name][t]["edges"] for t in wider])
            points.append((widths[name], training_summary(name, folder)["loss"], mean_wider))
        rows.append(
            {
                "d_model": widths[name],
                "density": f"{RECIPES[name].density:.4f}",
                **model_row(name, folder),
                "tasks learned": len(learned[name]),
                f"edges, geometric mean over the {len(common)} all learned": (
                    f"{edges_mean([best[name][t]['edges'] for t in common]):.1f}"
                ),
                f"over the {len(wider)} all but the narrowest learned": (
                    "–" if math.isnan(mean_wider) else f"{mean_wider:.1f}"
                ),
            }
        )

    def draw(axes: Any) -> None:
        axes.plot([size for *_, size in points], [loss for _, loss, _ in points], "C0-o")
        for width, loss, size in points:
            if math.isfinite(size):
                axes.annotate(
                    f"d_model {width}", (size, loss), xytext=(0, 9), textcoords="offset points",
                    ha="center",
                )  # fmt: skip
        axes.set(
            xlabel="edges in circuit, geometric mean over shared tasks",
            ylabel="validation loss, nats (lower is better)",
            title="Width at a fixed number of nonzeros",
        )
        axes.margins(0.2)

    by_task: list[dict[str, object]] = []
    for task in shared:
        edges = [best[name].get(task, {}).get("edges", "–") for name in names]
        by_task.append({"task": task} | dict(zip(columns, edges, strict=True)))
    by_width = "; ".join(
        f"{c}: {', '.join(learned[n])}" for c, n in zip(columns, names, strict=True)
    )
    return "\n\n".join(
        [
            "# Width at a fixed number of nonzeros",
            __doc__.strip().split("\n\n")[1] + " One training run each.",
            table(rows),
            experiment.picture(draw, "Validation loss and edges against width", (5, 4)),
            f"Edges of the smallest circuit at a target loss of {COMPARED:g}, {CONFIG.num_seeds} "
            "pruning seeds, on the tasks that two widths or more learned:",
            table(by_task),
            f"Learned: {by_width}."
            + (f" Not looked at yet: {', '.join(missing)}." if missing else ""),
        ]
    )


if __name__ == "__main__":
    main(run, __doc__, "width_frontier")
