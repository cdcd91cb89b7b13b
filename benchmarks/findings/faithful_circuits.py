"""Circuits by the paper's search against searches that do not need the rest to be off.

The paper's search lets everything outside a circuit be silent while it looks. The others also ask
that the circuit answers beside a random part of the rest, or beside the part that an adversary
picks. Every circuit is then checked alike by `verify_circuit`, on held-out prompts.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from hf_circuit_sparsity.circuits.ablation import reference_input_ids, reference_means
from hf_circuit_sparsity.circuits.circuit import Circuit
from hf_circuit_sparsity.circuits.evaluation.alternatives import fabricated_circuits
from hf_circuit_sparsity.circuits.evaluation.verification import verify_circuit
from hf_circuit_sparsity.circuits.gating import GatedModel
from hf_circuit_sparsity.circuits.pruning.config import PruningConfig
from hf_circuit_sparsity.circuits.pruning.find import TaskNotLearnedError, find_circuits
from hf_circuit_sparsity.circuits.supersets import adversarial_superset
from hf_circuit_sparsity.circuits.task_scores import (
    all_pair_logits,
    binary_accuracy,
    model_scores,
    task_rows,
    trimmed,
)
from hf_circuit_sparsity.commands.console import say
from hf_circuit_sparsity.metrics.circuit_size.geometric_mean import geometric_mean
from hf_circuit_sparsity.modeling.modeling_circuitgpt import CircuitGPTForCausalLM
from hf_circuit_sparsity.tasks.binary_task import BinaryTask
from hf_circuit_sparsity.tasks.load import load_task

from ..experiment import Experiment, grouped, machine, mean, spread, stored, table
from .findings import SEARCHES, Loaded, loaded
from .trained_models import FOLDER, training_summary

TARGET = 0.3
ANY = "any by an adversary"
BASE = replace(SEARCHES["brisk"], num_seeds=1, max_steps=360, target_loss=TARGET)
_ADVERSARIAL = replace(
    BASE, outside="adversarial", adversary_steps=2, selection_supersets=12, adversary_nodes=16
)
RESTS: dict[str, PruningConfig] = {
    "off": BASE,
    "off, stricter": replace(BASE, target_loss=TARGET / 2),
    "random": replace(BASE, outside="random"),
    "16 by an adversary": _ADVERSARIAL,
    ANY: replace(_ADVERSARIAL, max_steps=2 * BASE.max_steps, adversary_steps=4, adversary_nodes=0),
}
"""What the rest does while circuits are looked for."""
CHECKS = (
    "sufficiency", "random supersets", "worst superset", "adversarial superset",
    "adversary of 16 nodes", "adversary of 64 nodes", "interchange", "logit difference moved",
    "minimality", "transfer",
)  # fmt: skip
QUICKSTART = "quickstart"
SPARSE = (QUICKSTART, "topk-128-seed0", "topk-128-seed1")
DENSE = ("dense-abstopk-128-seed0", "dense-abstopk-128-seed1")
PAIRS = dict(zip(SPARSE[1:], DENSE, strict=True))
ADVERSARIES = (16, 64)


def run(experiment: Experiment) -> str:
    """Find, check and compare what is not there yet; returns the report."""
    o = experiment.options
    rows = [
        row
        for seed in range(o.seeds)
        for name in o.models
        for task in o.tasks
        for rest in o.rests
        if (row := _cell(experiment, name, task, rest, seed)) is not None
    ]
    for row in rows:
        if row["seed"] == 0 and row["rest"] in o.nonsense and "refused" not in row:
            row["nonsense"] = _nonsense(experiment, row["model"], row["task"], row["rest"])
    return report(rows, experiment)


def _cell(
    experiment: Experiment, name: str, task: str, rest: str, seed: int
) -> dict[str, Any] | None:
    """One circuit and its checks; None where it is not stored and nothing is to be measured."""
    folder = experiment.folder / "faithful"
    path = folder / f"{name} {task} {rest} {seed}.json"
    if not path.is_file() and (experiment.stored_only or not _is_there(experiment.folder, name)):
        return None

    def measure() -> dict[str, Any]:
        say(f"{name}, {task}, rest {rest}, seed {seed}")
        model, tokenizer, means = _loaded(name, experiment.folder)
        of_task = _task(task, tokenizer, model)
        config = replace(RESTS[rest], seed=seed)
        try:
            (circuit,) = find_circuits(model, of_task, config, reference=means, progress=False)
        except TaskNotLearnedError as error:
            return {"refused": str(error)}
        circuit.save_pretrained(folder / "circuits" / path.stem)
        checks = verify_circuit(
            circuit, model, of_task, prompts=128, random_circuits=2, subsets=1, stability_seeds=0,
            adversarial={}, progress=False,
        )  # fmt: skip
        found = {c.name: c.value for c in checks.checks}
        found |= _attacked(circuit, model, of_task)
        return {
            "nodes": len(circuit),
            "edges": circuit.metrics["edges"],
            **{check: found[check] for check in CHECKS if check in found},
        }

    return {"model": name, "task": task, "rest": rest, "seed": seed, **stored(path, measure)}


def _attacked(circuit: Circuit, model: Any, task: BinaryTask) -> dict[str, float]:
    """Skill beside the worst of so many nodes of the rest, picked on training prompts."""
    keep, means = circuit.masks_and_means(model)
    seen, test = task_rows(task.tensors("train"), slice(128)), task.tensors("test")
    gated, skills = GatedModel(model, means), {}
    whole = binary_accuracy(all_pair_logits(model, test)) - 0.5
    for most in ADVERSARIES:
        worst = adversarial_superset(
            gated, trimmed(seen), keep, circuit.calibration.pairs,
            torch.Generator().manual_seed(0), steps=16, restarts=2, most=most,
        )  # fmt: skip
        with circuit.apply(model, beside=worst):
            right = binary_accuracy(all_pair_logits(model, test))
        skills[f"adversary of {most} nodes"] = (right - 0.5) / whole
    return skills


def _nonsense(experiment: Experiment, name: str, task: str, rest: str) -> dict[str, Any]:
    """What the same search makes of answers that have nothing to do with the prompts."""
    folder = experiment.folder / "faithful"
    path = folder / f"{name} {task} {rest} nonsense.json"
    if experiment.stored_only and not path.is_file():
        return {}

    def measure() -> dict[str, Any]:
        say(f"{name}, nonsense {task}, rest {rest}")
        model, tokenizer, means = _loaded(name, experiment.folder)
        of_task = _task(task, tokenizer, model)
        circuit = Circuit.from_pretrained(folder / "circuits" / f"{name} {task} {rest} 0")
        whole = model_scores(model, of_task.tensors("train"), of_task.tensors("test"))
        made = fabricated_circuits(
            circuit, model, of_task, whole.calibration, means, progress=False
        )["nonsense task"]
        return {"nodes": made.nodes, "loss": made.loss, "accuracy": made.accuracy}

    return stored(path, measure)


def _is_there(folder: Path, name: str) -> bool:
    """Other models are trained where they are not there; the quickstart makes its own."""
    return name != QUICKSTART or (folder / QUICKSTART / "model").is_dir()


@lru_cache(maxsize=2)
def _loaded(name: str, folder: Path) -> Loaded:
    if name != QUICKSTART:
        return loaded(name, folder)
    model = CircuitGPTForCausalLM.from_pretrained(folder / name / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / name / "tokenizer")
    ids = reference_input_ids(model, tokenizer, None, BASE.reference_tokens)
    return Loaded(model, tokenizer, reference_means(model, ids))


def _task(task: str, tokenizer: Any, model: Any) -> Any:
    return load_task(
        task, tokenizer, n_train=2 * BASE.selection_prompts, n_test=256,
        max_length=model.config.max_position_embeddings,
    )  # fmt: skip


def report(rows: Sequence[dict[str, Any]], experiment: Experiment) -> str:
    """The tables."""
    found = [row for row in rows if "refused" not in row]
    lines = []
    for (name, task, rest), of_search in grouped(found, "model", "task", "rest").items():
        nonsense = next((row["nonsense"] for row in of_search if row.get("nonsense")), None)
        line: dict[str, object] = {
            "model": name, "task": task, "rest": rest, "seeds": len(of_search),
        }  # fmt: skip
        for key in ("nodes", "edges", *CHECKS):
            values = [row[key] for row in of_search if key in row]
            line[key] = spread(values, 0 if max(values, default=0) >= 10 else 2)
        line["nonsense: nodes, right"] = (
            f"{nonsense['nodes']}, {nonsense['accuracy']:.0%}" if nonsense else "–"
        )
        lines.append(line)
    refused = sorted({f"{row['model']}: {row['task']}" for row in rows if "refused" in row})
    return "\n\n".join([
        "# Faithful circuits", *__doc__.strip().split("\n\n"), EXPLANATION,
        f"Measured on: {machine()}.", table(lines),
        "Beside the paper's search, over sparse models and tasks: geometric means of ratios of "
        "means over seeds; means of the checks:",
        table(_ratios([row for row in found if row["rest"] != ANY])),
        "The same where circuits were found beside any part that an adversary picks, too:",
        table(_ratios(found)),
        experiment.picture(
            partial(_draw, found), "Skill beside adversaries against nodes", (11, 3.6), ncols=3
        ),
        "Dense against sparse models of equal loss, by search:", table(_dense_ratios(found)),
        f"Not learned well enough for a target of {TARGET:g}: {', '.join(refused) or 'none'}.",
        _losses(experiment),
    ])  # fmt: skip


EXPLANATION = f"""\
Target loss {TARGET:g} nats ("stricter": half of it; selected at 0.8 of it on training prompts),
{BASE.max_steps} mask updates of {BASE.batch_size} pairs (beside any part that an adversary picks,
twice as many), the masks' seed drawn anew.
Skills (supersets, transfer) are shares of the whole model's accuracy above guessing. "nonsense" is
what the same search, with the check bypassed that the model has learned the task, makes of answers
that an irrelevant token decides: nodes used, and how often they are right on the prompts searched
with (guessing is 50 %).
After ± is the standard deviation over seeds."""


def _ratios(rows: Sequence[dict[str, Any]]) -> list[dict[str, object]]:
    by_cell = grouped(rows, "model", "task", "rest")
    rests = [rest for rest in RESTS if any(r == rest for _, _, r in by_cell)]
    # Only where every search was made, so that all means are of the same models and tasks.
    common = [
        (name, task)
        for name, task in grouped(rows, "model", "task")
        if name in SPARSE and all((name, task, rest) in by_cell for rest in rests)
    ]
    lines = []
    for rest in rests if common else ():
        pairs = [(by_cell[(*cell, "off")], by_cell[(*cell, rest)]) for cell in common]
        line: dict[str, object] = {"rest": rest, "models and tasks": len(pairs)}
        for size in ("nodes", "edges"):
            ratios = [
                mean([max(1, r[size]) for r in other]) / mean([max(1, r[size]) for r in off])
                for off, other in pairs
            ]
            line[f"{size}, against off"] = f"{geometric_mean(ratios):.2f} ×"
        for check in CHECKS[1:]:
            values = [
                mean([r[check] for r in other if check in r])
                for _, other in pairs
                if any(check in r for r in other)
            ]
            line[check] = f"{mean(values):.2f} (least {min(values):.2f})" if values else "–"
        lines.append(line)
    return lines


def _dense_ratios(rows: Sequence[dict[str, Any]]) -> list[dict[str, object]]:
    by_cell = grouped(rows, "model", "task", "rest")
    lines = []
    for rest in RESTS:
        for size in ("nodes", "edges"):
            ratios = {
                (sparse, task): mean([r[size] for r in by_cell[dense, task, rest]])
                / mean([max(1, r[size]) for r in of_sparse])
                for (sparse, task, r), of_sparse in by_cell.items()
                for dense in [PAIRS.get(sparse)]
                if r == rest and (dense, task, rest) in by_cell
            }
            if ratios:
                by_pair = {
                    sparse: geometric_mean([v for (s, _), v in ratios.items() if s == sparse])
                    for sparse in {s for s, _ in ratios}
                }
                lines.append({
                    "rest": rest, "size": size, "models and tasks": len(ratios),
                    "dense / sparse": f"{geometric_mean(list(ratios.values())):.1f} ×",
                    "from": f"{min(ratios.values()):.1f} to {max(ratios.values()):.1f} ×",
                    "by training run": ", ".join(f"{v:.1f} ×" for _, v in sorted(by_pair.items())),
                })  # fmt: skip
    return lines


def _draw(rows: Sequence[dict[str, Any]], panels: Any) -> None:
    """Skill against nodes, a panel for every adversary, a point for every circuit."""
    names = [*(f"adversary of {most} nodes" for most in ADVERSARIES), "adversarial superset"]
    for axes, name in zip(panels, names, strict=True):
        for (rest,), of_search in grouped(rows, "rest").items():
            sparse = [row for row in of_search if row["model"] in SPARSE and name in row]
            axes.plot(
                [row["nodes"] for row in sparse], [row[name] for row in sparse], "o", label=rest,
                alpha=0.7, markersize=4,
            )  # fmt: skip
        axes.axhline(0.9, color="grey", linewidth=0.8)
        axes.set(title=name, xscale="log", xlabel="nodes", ylim=(-0.1, 1.2))
    panels[0].set_ylabel("share of the model's skill")
    panels[0].legend(title="the rest, in the search", fontsize=7, title_fontsize=7)


def _losses(experiment: Experiment) -> str:
    lines = [
        {"model": name, "validation loss": f"{summary['loss']:.3f}",
         "nonzeros": f"{summary['nonzeros']:,}"}
        for name in dict.fromkeys(experiment.options.models)
        if (summary := training_summary(name, experiment.folder))
    ]  # fmt: skip
    return table(lines)


def main() -> None:
    """The command line."""
    Experiment.main(
        run, __doc__, "faithful_circuits", str(FOLDER), models=(*SPARSE, *DENSE),
        tasks=("single_double_quote", "while_return_true", "if_equals", "else_elif"),
        rests=tuple(RESTS), seeds=3, nonsense=("off", "16 by an adversary"),
    )  # fmt: skip


if __name__ == "__main__":
    main()
