"""Circuits of models trained by random coordinate descent and by annealed top-k.

Same data, steps and number of nonzeros: size of circuits, what pruning seeds have in common, what
noise on the weights does to them, and how they do on templates they were not found with. Every task
is compared at one target loss: the lowest of those tried that circuits of both models reach on the
prompts they are selected on.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from hf_circuit_sparsity.circuits.edges import site_linears
from hf_circuit_sparsity.circuits.pruning.find import mean_jaccard
from hf_circuit_sparsity.circuits.task_loss import all_pair_logits, binary_loss, fit_calibration

from ..speed.measure import save_figure, table
from .findings import (
    CONFIG,
    RESULTS,
    TARGETS,
    arguments,
    edges_mean,
    frontier,
    kept,
    learned_tasks,
    loaded,
    lowest_common_target,
    smallest,
    stored_circuits,
    stored_tasks,
    task_for,
    task_losses,
    write_report,
)
from .trained_models import FOLDER, training_summary

TOPK, RCD = "topk-64-seed0", "rcd-64-seed0"
NOISE = (0.0, 0.05, 0.1, 0.2, 0.4)
DRAWS = 3


def run(folder: Path = FOLDER, results: Path = RESULTS, stored_only: bool = False) -> str:
    """Train, prune and compare what is not there yet; returns the report."""
    names = (TOPK, RCD)
    learned = {name: learned_tasks(name, folder, TARGETS[-1]) for name in names}
    common = sorted(set(learned[TOPK]) & set(learned[RCD]))
    missing: list[str] = []
    if stored_only:
        stored = stored_tasks(names, common, folder)
        missing, common = [t for t in common if t not in stored], stored
    rows = {name: {task: frontier(name, task, folder) for task in common} for name in names}
    targets = {t: lowest_common_target([rows[n][t] for n in names]) for t in common}
    common = [t for t in common if targets[t] is not None]
    if not common:
        return (
            "# Random coordinate descent against annealed top-k\n\nNo task that both models "
            f"learned has circuits of both yet. Not looked at: {', '.join(missing) or 'none'}."
        )
    noise = {
        name: {
            t: kept(
                folder / "measured" / name / "noise" / f"{t}-loss-{targets[t]:g}.json",
                lambda name=name, t=t: _noise(name, t, targets[t], folder),
            )
            for t in common
        }
        for name in names
    }
    lines = []
    for name in names:
        summary, scores = training_summary(name, folder), task_losses(name, folder)
        best = [smallest(rows[name][task], targets[task]) for task in common]
        jaccards = [mean_jaccard(stored_circuits(name, t, targets[t], folder)) for t in common]
        lines.append(
            (
                name,
                f"{summary['loss']:.3f}",
                f"{summary['nonzeros']:,}",
                len(learned[name]),
                f"{sum(s['calibrated_loss'] for s in scores.values()) / len(scores):.3f}",
                f"{edges_mean([b['edges'] for b in best]):.1f}",
                f"{_mean(jaccards):.2f}",
                f"{_mean([b['train_circuit_loss'] for b in best]):.3f}",
                f"{_mean([b['circuit_loss'] for b in best]):.3f}",
            )
        )
    _draw(noise, common, results / "rcd_against_topk.png")
    header = (
        "model", "validation loss", "nonzeros", "tasks learned", "mean task loss",
        "edges, geometric mean", "nodes shared by seeds (Jaccard)", "circuit's loss, its prompts",
        "unseen templates",
    )  # fmt: skip
    by_task = []
    for task in common:
        cells = [task, f"{targets[task]:g}"]
        for name in names:
            at = [r for r in rows[name][task] if r["target"] == targets[task]]
            best_row = smallest(at, targets[task])
            cells.append(", ".join(str(r["edges"]) for r in at))
            shared = mean_jaccard(stored_circuits(name, task, targets[task], folder))
            cells.append(f"{shared:.2f}")
            cells.append(f"{best_row['train_circuit_loss']:.3f} → {best_row['circuit_loss']:.3f}")
        by_task.append(cells)
    noisy = [
        (
            f"{level:g}",
            *(
                f"{_mean([noise[name][t][part][i] for t in common]):.3f}"
                for part in ("model", "circuit")
                for name in names
            ),
        )
        for i, level in enumerate(NOISE)
    ]
    return "\n\n".join(
        [
            "# Random coordinate descent against annealed top-k",
            __doc__.split("\n\n")[1] + " One training run each.",
            table(header, lines),
            f"By task: edges for every pruning seed ({CONFIG.seeds}), nodes the seeds share "
            "(Jaccard), loss of the smallest circuit on its prompts → on unseen templates:",
            table(
                (
                    "task",
                    "target loss",
                    "top-k: edges",
                    "shared",
                    "loss",
                    "RCD: edges",
                    "shared",
                    "loss",
                ),
                by_task,
            ),
            "Each nonzero weight between nodes times 1 + noise · N(0, 1): mean task loss over the "
            f"tasks and {DRAWS} draws, on unseen templates. The model is calibrated once, without "
            "noise.",
            table(("noise", "model, top-k", "model, RCD", "circuit, top-k", "circuit, RCD"), noisy),
            "![Task loss against noise on the weights](rcd_against_topk.png)",
            "Learned: "
            + "; ".join(f"{name}: {', '.join(learned[name])}" for name in names)
            + "."
            + (f" Not looked at yet: {', '.join(missing)}." if missing else ""),
        ]
    )


def _noise(name: str, task_name: str, target: float, folder: Path) -> dict[str, list[float]]:
    """Mean loss of model and smallest circuit on held-out prompts, for every level of noise."""
    model, _, _ = loaded(name, folder)
    task = task_for(name, task_name, folder)
    train, test = task.tensors("train"), task.tensors("test")
    test = {k: v[:256] for k, v in test.items()}
    calibration = fit_calibration(all_pair_logits(model, train), train)
    circuit = min(
        stored_circuits(name, task_name, target, folder), key=lambda c: c.metrics["edges"]
    )
    result: dict[str, list[float]] = {"model": [], "circuit": []}
    for level in NOISE:
        losses: dict[str, list[float]] = {"model": [], "circuit": []}
        for draw in range(DRAWS if level else 1):
            with noisy_weights(model, level, draw):
                pairs = calibration.pairs(all_pair_logits(model, test), test)
                losses["model"].append(binary_loss(pairs).item())
                with circuit.applied(model):
                    losses["circuit"].append(binary_loss(all_pair_logits(model, test)).item())
        for part, values in losses.items():
            result[part].append(sum(values) / len(values))
    return result


@contextmanager
def noisy_weights(model: nn.Module, level: float, seed: int) -> Iterator[None]:
    """Within the block, every weight between nodes is multiplied by 1 + level · N(0, 1)."""
    generator = torch.Generator().manual_seed(seed)
    weights = [linear.weight for linear, _, _ in site_linears(model)]
    before = [weight.detach().clone() for weight in weights]
    try:
        with torch.no_grad():
            for weight in weights:
                weight.mul_(1 + level * torch.randn(weight.shape, generator=generator))
        yield
    finally:
        with torch.no_grad():
            for weight, original in zip(weights, before, strict=True):
                weight.copy_(original)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _draw(noise: dict, tasks: list[str], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5.5, 4), layout="constrained")
    for name, colour, label in ((TOPK, "C0", "top-k"), (RCD, "C1", "RCD")):
        for part, style in (("model", "--s"), ("circuit", "-o")):
            means = [_mean([noise[name][t][part][i] for t in tasks]) for i in range(len(NOISE))]
            axes.plot(NOISE, means, f"{colour}{style}", label=f"{label}, {part}")
    axes.axhline(0.693, color="C7", linewidth=0.8, linestyle=":")
    axes.set(xlabel="noise on each weight, relative", ylabel="task loss, nats")
    axes.set_title(f"Noise on the weights, mean over {len(tasks)} tasks")
    axes.legend()
    save_figure(figure, path)
    pyplot.close(figure)


if __name__ == "__main__":
    args = arguments(__doc__)
    write_report(args.results, "rcd_against_topk", run(args.folder, args.results, args.stored_only))
