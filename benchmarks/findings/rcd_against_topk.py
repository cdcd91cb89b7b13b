"""Circuits of models trained by random coordinate descent and by annealed top-k.

Same data, steps and number of nonzeros: size of circuits, what pruning seeds have in common, what
noise on the weights does to them, and how they do on templates they were not found with. Every task
is compared at one target loss: the lowest of those tried that circuits of both models reach on the
prompts they are selected on.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_circuit_sparsity.circuits.pruning.find import mean_jaccard
from hf_circuit_sparsity.circuits.task_scores import all_pair_logits, binary_loss, fit_calibration
from hf_circuit_sparsity.decoders.decoder import decoder_of

from ..experiment import Experiment, mean, stored, table
from .findings import (
    CONFIG,
    TARGETS,
    edges_mean,
    frontier,
    learned_tasks,
    loaded,
    lowest_common_target,
    main,
    model_row,
    smallest,
    stored_circuits,
    stored_tasks,
    task_for,
)

MODELS = {"top-k": "topk-64-seed0", "RCD": "rcd-64-seed0"}
NOISE = (0.0, 0.05, 0.1, 0.2, 0.4)
DRAWS = 3


def run(experiment: Experiment) -> str:
    """Train, prune and compare what is not there yet; returns the report."""
    folder, title = experiment.folder, "# Random coordinate descent against annealed top-k"
    learned = {side: learned_tasks(name, folder, TARGETS[-1]) for side, name in MODELS.items()}
    common = sorted(set.intersection(*map(set, learned.values())))
    missing: list[str] = []
    if experiment.stored_only:
        measured = stored_tasks(list(MODELS.values()), common, folder)
        missing, common = [t for t in common if t not in measured], measured
    rows = {side: {t: frontier(name, t, folder) for t in common} for side, name in MODELS.items()}
    targets = {t: lowest_common_target([of_side[t] for of_side in rows.values()]) for t in common}
    common = [t for t in common if targets[t] is not None]
    if not common:
        return (
            f"{title}\n\nNo task that both models learned has circuits of both yet. Not looked at: "
            f"{', '.join(missing) or 'none'}."
        )
    noise: dict[str, dict[str, list[float]]] = {}
    models = []
    by_task: dict[str, dict[str, object]] = {
        t: {"task": t, "target loss": f"{targets[t]:g}"} for t in common
    }
    for side, name in MODELS.items():
        levels = [
            stored(
                folder / "measured" / name / "noise" / f"{t}-loss-{targets[t]:g}.json",
                lambda name=name, t=t: _noise(name, t, targets[t], folder),
            )
            for t in common
        ]
        for part in ("model", "circuit"):
            means = [mean(losses) for losses in zip(*(task[part] for task in levels), strict=True)]
            noise[f"{part}, {side}"] = means
        best = {t: smallest(rows[side][t], targets[t]) for t in common}
        jaccard = {t: mean_jaccard(stored_circuits(name, t, targets[t], folder)) for t in common}
        models.append(
            {
                **model_row(name, folder),
                "tasks learned": len(learned[side]),
                "edges, geometric mean": f"{edges_mean([b['edges'] for b in best.values()]):.1f}",
                "nodes shared by seeds (Jaccard)": f"{mean(list(jaccard.values())):.2f}",
                "circuit's loss, its prompts": (
                    f"{mean([b['train_circuit_loss'] for b in best.values()]):.3f}"
                ),
                "unseen templates": f"{mean([b['circuit_loss'] for b in best.values()]):.3f}",
            }
        )
        for task, line in by_task.items():
            at = [str(r["edges"]) for r in rows[side][task] if r["target"] == targets[task]]
            row = best[task]
            line[f"{side}: edges"] = ", ".join(at)
            line[f"{side}: shared"] = f"{jaccard[task]:.2f}"
            line[f"{side}: loss"] = f"{row['train_circuit_loss']:.3f} → {row['circuit_loss']:.3f}"
    noisy = [
        {"noise": f"{level:g}", **{column: f"{noise[column][i]:.3f}" for column in sorted(noise)}}
        for i, level in enumerate(NOISE)
    ]

    def draw(axes: Any) -> None:
        for side, colour in zip(MODELS, ("C0", "C1"), strict=True):
            for part, style in (("model", "--s"), ("circuit", "-o")):
                label = f"{part}, {side}"
                axes.plot(NOISE, noise[label], f"{colour}{style}", label=label)
        axes.axhline(0.693, color="C7", linewidth=0.8, linestyle=":")
        axes.set(xlabel="noise on each weight, relative", ylabel="task loss, nats")
        axes.set_title(f"Noise on the weights, mean over {len(common)} tasks")
        axes.legend()

    return "\n\n".join(
        [
            title,
            __doc__.strip().split("\n\n")[1] + " One training run each.",
            table(models),
            f"By task: edges for every pruning seed ({CONFIG.num_seeds}), nodes the seeds share "
            "(Jaccard), loss of the smallest circuit on its prompts → on unseen templates:",
            table(list(by_task.values())),
            "Each nonzero weight between nodes times 1 + noise · N(0, 1): mean task loss over the "
            f"tasks and {DRAWS} draws, on unseen templates. The model is calibrated once, without "
            "noise.",
            table(noisy),
            experiment.picture(draw, "Task loss against noise on the weights"),
            "Learned: "
            + "; ".join(f"{side}: {', '.join(tasks)}" for side, tasks in learned.items())
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
                with circuit.apply(model):
                    losses["circuit"].append(binary_loss(all_pair_logits(model, test)).item())
        for part, values in losses.items():
            result[part].append(mean(values))
    return result


@contextmanager
def noisy_weights(model: nn.Module, level: float, seed: int) -> Iterator[None]:
    """Within the block, every weight between nodes is multiplied by 1 + level · N(0, 1)."""
    generator = torch.Generator().manual_seed(seed)
    weights = [projection.module.weight for projection in decoder_of(model).projections()]
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


if __name__ == "__main__":
    main(run, __doc__, "rcd_against_topk")
