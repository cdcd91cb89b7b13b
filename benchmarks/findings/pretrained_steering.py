"""Steering a real pretrained model by the neurons of its sparse descendant's circuit.

`benchmarks.findings.pretrained` made SmolLM2-135M sparse, from its own weights, and cut circuits
out of both. Both models have one basis, so no bridge is needed to ask: does the sparse circuit say
where the *dense* model's answer can be turned? A neuron's move is its column of the MLP's output
matrix times the difference of its mean value between the task's two answers, at the last position;
it is added to the dense model's stream after that MLP, at every token.

Directions of every kind are chosen alike, on training prompts: the few that promise most to
first order are followed as far as a price allows, KL(unsteered ‖ steered) on unrelated Python, and
the one that turns the answer most is measured on held-out prompts. The sparse circuit's neurons are
tried as the sparse model has them, and as the dense model does, which gave them their places. The
controls are as many neurons of the same model outside the circuit, layer by layer as many, drawn at
random; and, without any sparse model, the dense model's own circuit, all of its neurons, and the
difference of means of its stream.
"""

import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_circuit_sparsity.bridge.intervention import location_name
from hf_circuit_sparsity.bridge.priced_steering import (
    StreamShift,
    best_at_price,
    mean_difference_shifts,
)
from hf_circuit_sparsity.bridge.steering import (
    answer_rows,
    margin_gradients,
    tokens_beginning_alike,
)
from hf_circuit_sparsity.circuits.ablation import recorded_sites
from hf_circuit_sparsity.circuits.circuit import Circuit
from hf_circuit_sparsity.circuits.task_scores import TaskTensors
from hf_circuit_sparsity.commands.console import say
from hf_circuit_sparsity.decoders.decoder import decoder_of
from hf_circuit_sparsity.files import write_json
from hf_circuit_sparsity.tasks.binary_task import BinaryTask
from hf_circuit_sparsity.tasks.load import load_task
from hf_circuit_sparsity.tasks.packing import spread_sample

from ..experiment import Experiment, machine, mean, table
from .pretrained import DENSE, SPARSE, blocks, load

ROWS = 32  # prompts of each split
TRIED = 8  # directions of every kind that are followed, those that promise most
DRAWS = 3  # of control neurons
PRICE = 0.1
Nodes = Mapping[int, Sequence[int]]  # layer → neurons


def neurons(circuit: Circuit, depth: int) -> dict[int, list[int]]:
    """The MLP neurons of a circuit, by layer."""
    return {i: list(circuit.nodes.get(f"h.{i}.mlp.post_act", ())) for i in range(depth)}


def neuron_shifts(model: PreTrainedModel, rows: TaskTensors, nodes: Nodes) -> list[StreamShift]:
    """What a model's neurons add to its stream where the other answer is right, less what they add
    where the first is."""
    values = []
    sites = [f"h.{i}.mlp.post_act" for i in nodes]
    for side in ("counterfactual_", ""):
        with torch.no_grad(), recorded_sites(model, sites) as seen:
            model(rows[f"{side}input_ids"], attention_mask=rows[f"{side}attention_mask"])
        values.append({site: seen[site][:, -1].float().mean(0) for site in sites})
    shifts = []
    for (i, chosen), site in zip(nodes.items(), sites, strict=True):
        write = decoder_of(model).layers[i].down.weight.detach()
        difference = values[0][site] - values[1][site]
        shifts += [StreamShift(2 * i + 2, difference[n] * write[:, n], n) for n in chosen]
    return shifts


def outside(nodes: Nodes, width: int, draw: random.Random) -> dict[int, list[int]]:
    """As many other neurons of every layer."""
    return {
        i: draw.sample(sorted(set(range(width)) - set(chosen)), len(chosen))
        for i, chosen in nodes.items()
    }


def directions(
    folder: Path, task: BinaryTask, rows: TaskTensors, dense: PreTrainedModel, target: int
) -> dict[str, list[StreamShift]]:
    """The kinds of directions that are compared."""
    sparse, _ = load(folder, SPARSE)
    depth, width = decoder_of(dense).depth, dense.config.intermediate_size
    own, found = (
        neurons(Circuit.from_pretrained(folder / "circuits" / name / f"{task.name}-0"), depth)
        for name in (DENSE, SPARSE)
    )
    draw = random.Random(0)
    draws = [outside(found, width, draw) for _ in range(DRAWS)]
    kinds = {}
    for model, has in ((sparse, "sparse"), (dense, "dense")):
        kinds[f"sparse circuit's neurons, in the {has} model"] = neuron_shifts(model, rows, found)
        for i, others in enumerate(draws):
            name = f"as many others in the {has} model, draw {i}"
            kinds[name] = neuron_shifts(model, rows, others)
    kinds["dense circuit's neurons"] = neuron_shifts(dense, rows, own)
    everything = {i: range(width) for i in range(depth)}
    kinds["all neurons of the dense model"] = neuron_shifts(dense, rows, everything)
    kinds["difference of means"] = mean_difference_shifts(dense, task, target, ROWS)
    return kinds


def steer(folder: Path, name: str) -> None:
    """Measure every answer and kind of direction that was not measured before."""
    dense, tokenizer = load(folder, DENSE)
    task = load_task(name, tokenizer, n_train=256, n_test=128)
    text = torch.tensor(spread_sample(blocks(folder, tokenizer)["validation"], 4)["input_ids"])
    text = text[:, :128]
    for target in sorted(set(task.test["target_id"])):
        rows = answer_rows(task, "train", target, ROWS)
        same = tokens_beginning_alike(tokenizer, rows)
        row = next(r for r in task.test if r["target_id"] == target)
        about = {"task": name, "answer": row["target"], "other": row["counterfactual_target"]}
        gradients = margin_gradients(decoder_of(dense), rows)
        for kind, shifts in directions(folder, task, rows, dense, target).items():
            path = _path(folder, name) / f"{target}_{re.sub(r'[^a-z0-9]+', '_', kind)}.json"
            if path.is_file():
                continue
            say(f"  {name}, {row['target']!r}, {kind}")
            shifts.sort(key=lambda s: -float(s.vector @ gradients[s.location]))
            found = best_at_price(
                dense, task, target, shifts[:TRIED], text, PRICE, rows=ROWS, same=same
            )
            figures = {k: v for k, v in asdict(found).items() if k != "shift"}
            place = {"location": found.shift.location, "channel": found.shift.channel}
            write_json(path, {**about, "kind": kind, "pool": len(shifts), **place, **figures})


def _path(folder: Path, task: str) -> Path:
    return folder / "measured" / "steering" / task


def report(lines: Sequence[dict[str, Any]]) -> str:
    """One row per task and answer; draws of the control together."""
    rows = []
    for key in dict.fromkeys((line["task"], line["answer"]) for line in lines):
        ours = [line for line in lines if (line["task"], line["answer"]) == key]
        first = ours[0]
        row = {
            "task": key[0],
            "steered": f"`{first['answer']!r}` → `{first['other']!r}`",
            "unsteered": f"{first['unsteered_probability']:.3f}",
        }
        for kind in dict.fromkeys(line["kind"].partition(", draw ")[0] for line in ours):
            of_kind = [line for line in ours if line["kind"].partition(", draw ")[0] == kind]
            reached = [line["other_probability"] for line in of_kind]
            row[kind] = (
                f"{mean(reached):.3f} ({min(reached):.3f}–{max(reached):.3f})"
                if len(reached) > 1
                else f"{reached[0]:.3f} (after {location_name(of_kind[0]['location'])})"
            )
        pools = [line["pool"] for line in ours if line["kind"].startswith("sparse circuit")]
        row["the circuit's neurons"] = f"{max(pools, default=0)}"
        rows.append(row)
    return table(rows)


def run(experiment: Experiment) -> str:
    """Measure what is not there yet; returns the report."""
    folder, options = experiment.folder, experiment.options
    torch.set_num_threads(options.threads)
    lines: list[dict[str, Any]] = []
    for name in options.tasks:
        if not experiment.stored_only:
            # Products in bfloat16, as in the searches: less than half the time.
            with torch.autocast("cpu", torch.bfloat16):
                steer(folder, name)
        paths = sorted(_path(folder, name).glob("*.json"))
        lines += [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    return "\n\n".join([
        "# Steering SmolLM2 by what its sparse descendant says",
        __doc__.strip().split("\n\n", 1)[1],
        f"Measured on: {machine('cpu')}.",
        f"Mean probability of the answer that is wrong, over {ROWS} held-out prompts, at a KL of "
        f"at most {PRICE:g} nats per token on 512 tokens of held-out Python; of every kind the "
        f"{TRIED} most promising are tried. An answer counts with all tokens that begin with it.",
        report(lines),
    ])  # fmt: skip


if __name__ == "__main__":
    Experiment.main(
        run, __doc__, "pretrained_steering", "runs/pretrained", threads=2,
        tasks=("single_double_quote",),
    )  # fmt: skip
