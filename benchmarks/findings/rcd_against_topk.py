"""Circuits of models trained by random coordinate descent and by annealed top-k, at equal loss.

Same data and number of nonzeros; every model trained by RCD stops at the validation loss of its
twin of the same seed. Of every task that both have learned the circuits of both are compared: size,
checks of `verify_circuit`, what training seeds and pruning seeds have in common, what noise on the
weights does, and unseen templates.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_circuit_sparsity.circuits.circuit import Circuit
from hf_circuit_sparsity.circuits.evaluation.verification import verify_circuit
from hf_circuit_sparsity.circuits.pruning.find import mean_jaccard
from hf_circuit_sparsity.circuits.task_scores import (
    all_pair_logits,
    binary_loss,
    fit_calibration,
    task_rows,
)
from hf_circuit_sparsity.commands.console import say
from hf_circuit_sparsity.commands.quickstart import QUICK_CHECKS
from hf_circuit_sparsity.decoders.decoder import decoder_of
from hf_circuit_sparsity.modeling.fingerprint import model_fingerprint

from ..experiment import Experiment, grouped, machine, mean, spread, stored, table
from .findings import (
    COMPARED,
    SEARCHES,
    edges_mean,
    frontier,
    learned_tasks,
    loaded,
    model_row,
    stored_circuits,
    stored_tasks,
    task_for,
)
from .trained_models import FOLDER, training_summary

SIDES = {"top-k": "topk-64", "RCD": "rcd-64"}
SEARCH = "brisk"
NOISE = (0.0, 0.05, 0.1, 0.2, 0.4)
DRAWS = 3


def run(experiment: Experiment) -> str:
    """Train, prune and compare what is not there yet; returns the report."""
    folder, only_stored = experiment.folder, experiment.stored_only
    seeds = [
        seed
        for seed in range(experiment.options.seeds)
        if not only_stored or all(training_summary(_name(s, seed), folder) for s in SIDES)
    ]
    cells = [
        cell
        for seed in seeds
        for task in _common(seed, experiment)
        for cell in _pair(seed, task, folder)
    ]
    models = []
    for seed in seeds:
        for side in SIDES:
            name = _name(side, seed)
            steps = {"steps": f"{training_summary(name, folder)['steps']:,}"}
            learned = {"tasks learned": len(learned_tasks(name, folder))}
            models.append({**model_row(name, folder), **steps, **learned})
    return report(models, cells, experiment)


def _name(side: str, seed: int) -> str:
    return f"{SIDES[side]}-seed{seed}"


def _common(seed: int, experiment: Experiment) -> list[str]:
    """The tasks that both models of a seed have learned; of these only what is stored, if so."""
    names = [_name(side, seed) for side in SIDES]
    learned = [set(learned_tasks(name, experiment.folder)) for name in names]
    common = sorted(set.intersection(*learned))
    if experiment.stored_only:
        return stored_tasks(names, common, experiment.folder, SEARCH)
    return common


def _pair(seed: int, task: str, folder: Path) -> list[dict[str, Any]]:
    """One row for either side; none if one of the two has no circuit at the target."""
    rows = []
    for side in SIDES:
        name = _name(side, seed)
        if not frontier(name, task, folder, (COMPARED,), SEARCH):
            return []
        circuits = stored_circuits(name, task, COMPARED, folder, SEARCH)
        best = min(circuits, key=lambda c: (c.metrics["edges"], len(c)))
        others = [c for c in circuits if c is not best]
        measured = stored(
            folder / "measured" / name / "compared" / f"{task}.json",
            lambda name=name, best=best, others=others: {
                "checks": _checks(name, task, best, others, folder),
                "noise": _noise(name, task, best, folder),
            },
        )
        rows.append({
            "side": side, "seed": seed, "task": task, **measured, "nodes": len(best),
            "edges": best.metrics["edges"], "shared": mean_jaccard(circuits),
            "seen": best.metrics["train_circuit_loss"], "unseen": best.metrics["circuit_loss"],
            "sites": {site: len(ids) for site, ids in best.nodes.items()},
        })  # fmt: skip
    return rows


def _checks(
    name: str, task: str, circuit: Circuit, others: Sequence[Circuit], folder: Path
) -> dict[str, Any]:
    """Check → its value and whether it passed; None where it has no threshold."""
    say(f"Checking the circuit of {name}, {task}")
    verification = verify_circuit(
        circuit, loaded(name, folder).model, task_for(name, task, folder, SEARCH),
        others=others, progress=False, **QUICK_CHECKS,
    )  # fmt: skip
    return {
        check.name: [check.value, None if check.threshold is None else check.passed]
        for check in verification.checks
    }


def _noise(name: str, task: str, circuit: Circuit, folder: Path) -> dict[str, list[float]]:
    """Mean loss of model and circuit on held-out prompts, for every level of noise."""
    model, tensors = loaded(name, folder).model, task_for(name, task, folder, SEARCH)
    train, test = tensors.tensors("train"), task_rows(tensors.tensors("test"), slice(256))
    calibration = fit_calibration(all_pair_logits(model, train), train)
    result: dict[str, list[float]] = {"model": [], "circuit": []}
    for level in NOISE:
        losses: dict[str, list[float]] = {"model": [], "circuit": []}
        for draw in range(DRAWS if level else 1):
            with noisy_weights(model, level, draw):
                pairs = calibration.pairs(all_pair_logits(model, test), test)
                losses["model"].append(binary_loss(pairs).item())
                noisy = replace(circuit, model_fingerprint=model_fingerprint(model))
                with noisy.apply(model):
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


def report(
    models: Sequence[dict[str, object]], cells: Sequence[dict[str, Any]], experiment: Experiment
) -> str:
    """The tables and the picture, of one row for every side, seed and task."""
    head = [
        "# Random coordinate descent against annealed top-k", *__doc__.strip().split("\n\n"),
        EXPLANATION, f"Measured on: {machine()}.", table(models),
    ]  # fmt: skip
    if not cells:
        return "\n\n".join([*head, "No task that both models learned has circuits of both yet."])
    by_side = {side: [cell for cell in cells if cell["side"] == side] for side in SIDES}
    return "\n\n".join([
        *head,
        "Over the tasks that both models of a seed have learned, by training seed; edges and nodes "
        "as geometric means, losses and Jaccard as means:",
        table(_sizes(cells)),
        "Checks: mean value, and how many of the circuits pass.",
        table(_verdicts(by_side)),
        "Training seeds: of two circuits of one task from two seeds, the nodes that can be paired "
        "with one at the same site, as a share of all (which node it is differs by chance); the "
        "control is circuits of two tasks from two seeds.",
        table(_seeds(by_side)),
        "Each nonzero weight between nodes times 1 + noise · N(0, 1): mean loss over tasks and "
        f"seeds and {DRAWS} draws, on unseen templates. The model is calibrated once, without "
        "noise.",
        table(_noisy(by_side)),
        _picture(by_side, experiment),
        "By task:", table(_by_task(cells)),
    ])  # fmt: skip


EXPLANATION = f"""\
Target loss {COMPARED:g} nats; {SEARCHES[SEARCH].max_steps} mask updates of
{SEARCHES[SEARCH].batch_size} pairs, {SEARCHES[SEARCH].num_seeds} seeds of masks, of which the
circuit with fewest edges is compared and checked. After ± is the standard deviation."""


def _sizes(cells: Sequence[dict[str, Any]]) -> list[dict[str, object]]:
    lines = []
    seeds = sorted({cell["seed"] for cell in cells})
    for seed in (*seeds, None):
        of = [cell for cell in cells if seed in (cell["seed"], None)]
        sides = {side: [cell for cell in of if cell["side"] == side] for side in SIDES}
        line: dict[str, object] = {"seed": "all" if seed is None else seed}
        line["tasks"] = len(sides["RCD"])
        for size in ("nodes", "edges"):
            means = {side: edges_mean([c[size] for c in rows]) for side, rows in sides.items()}
            for side, value in means.items():
                line[f"{size}, {side}"] = f"{value:.1f}"
            line[f"{size}, RCD / top-k"] = f"{means['RCD'] / means['top-k']:.2f}"
        for key, title in (
            ("shared", "pruning seeds' Jaccard"), ("seen", "loss"), ("unseen", "unseen templates")
        ):  # fmt: skip
            for side, rows in sides.items():
                line[f"{title}, {side}"] = f"{mean([c[key] for c in rows]):.2f}"
        lines.append(line)
    return lines


def _verdicts(by_side: dict[str, list[dict[str, Any]]]) -> list[dict[str, object]]:
    names = dict.fromkeys(
        check
        for rows in by_side.values()
        for cell in rows
        for check, (_, passed) in cell["checks"].items()
        if passed is not None
    )
    lines = []
    for check in names:
        line: dict[str, object] = {"check": check}
        for side, rows in by_side.items():
            found = [cell["checks"][check] for cell in rows if check in cell["checks"]]
            line[side] = spread([value for value, _ in found])
            line[f"{side}: pass"] = f"{sum(passed for _, passed in found)} of {len(found)}"
        lines.append(line)
    return lines


def _seeds(by_side: dict[str, list[dict[str, Any]]]) -> list[dict[str, object]]:
    lines = []
    for side, rows in by_side.items():
        same, other = [], []
        for a, b in combinations(rows, 2):
            if a["seed"] != b["seed"]:
                (same if a["task"] == b["task"] else other).append(_overlap(a["sites"], b["sites"]))
        sizes = [
            max(c["edges"] for c in of) / max(1, min(c["edges"] for c in of))
            for of in grouped(rows, "task").values()
            if len(of) > 1
        ]
        lines.append({
            "side": side, "pairs": len(same), "same task": spread(same), "other task":
            spread(other), "edges, largest / smallest over seeds": f"{edges_mean(sizes):.2f}",
        })  # fmt: skip
    return lines


def _overlap(a: dict[str, int], b: dict[str, int]) -> float:
    one, two = Counter(a), Counter(b)
    return (one & two).total() / (one | two).total()


def _noise_means(by_side: dict[str, list[dict[str, Any]]]) -> dict[str, list[float]]:
    return {
        f"{part}, {side}": [
            mean(at) for at in zip(*(cell["noise"][part] for cell in rows), strict=True)
        ]
        for part in ("model", "circuit")
        for side, rows in by_side.items()
    }


def _noisy(by_side: dict[str, list[dict[str, Any]]]) -> list[dict[str, object]]:
    means = _noise_means(by_side)
    return [
        {"noise": f"{level:g}", **{column: f"{means[column][i]:.3f}" for column in means}}
        for i, level in enumerate(NOISE)
    ]


def _picture(by_side: dict[str, list[dict[str, Any]]], experiment: Experiment) -> str:
    means = _noise_means(by_side)

    def draw(axes: Any) -> None:
        for side, colour in zip(SIDES, ("C0", "C1"), strict=True):
            for part, style in (("model", "--s"), ("circuit", "-o")):
                label = f"{part}, {side}"
                axes.plot(NOISE, means[label], f"{colour}{style}", label=label)
        axes.axhline(0.693, color="C7", linewidth=0.8, linestyle=":")
        axes.set(xlabel="noise on each weight, relative", ylabel="task loss, nats")
        axes.set_title("Noise on the weights, mean over tasks and seeds")
        axes.legend()

    return experiment.picture(draw, "Task loss against noise on the weights")


def _by_task(cells: Sequence[dict[str, Any]]) -> list[dict[str, object]]:
    lines = []
    for (task, seed), pair in grouped(cells, "task", "seed").items():
        line: dict[str, object] = {"task": task, "seed": seed}
        for cell in pair:
            passed = [ok for _, ok in cell["checks"].values() if ok is not None]
            line[f"{cell['side']}: nodes, edges"] = f"{cell['nodes']}, {cell['edges']}"
            line[f"{cell['side']}: loss"] = f"{cell['seen']:.3f} → {cell['unseen']:.3f}"
            line[f"{cell['side']}: checks"] = f"{sum(passed)} of {len(passed)}"
        lines.append(line)
    return sorted(lines, key=lambda line: (line["task"], line["seed"]))


if __name__ == "__main__":
    Experiment.main(run, __doc__, "rcd_against_topk", str(FOLDER), seeds=3)
