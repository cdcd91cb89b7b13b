"""What circuits do, node by node: which tokens excite a node, what its weights read and write.

The quote circuit is that of a model trained on the Python standard library alone. That corpus is
too small to teach such a model bracket counting and set or string, so their circuits are from one
a quarter of whose text was these tasks' training prompts, answered.
"""

from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hf_circuit_sparsity.circuits.attention import attention_patterns
from hf_circuit_sparsity.circuits.circuit import Circuit
from hf_circuit_sparsity.circuits.evaluation.verification import verify_circuit
from hf_circuit_sparsity.circuits.node_effects import node_effects
from hf_circuit_sparsity.circuits.viewer.activations import record_activations
from hf_circuit_sparsity.circuits.viewer.layout import GraphLink, Key, layered_graph

from ..experiment import Experiment, table
from .findings import (
    SEARCHES,
    TARGETS,
    frontier,
    learned_tasks,
    loaded,
    main,
    smallest,
    stored_circuits,
    stored_tasks,
    task_for,
    task_losses,
)
from .trained_models import training_summary

CIRCUITS = (
    ("topk-128-seed0", "single_double_quote"),
    ("taught-64-seed0", "bracket_counting"),
    ("taught-64-seed0", "set_or_string"),
)
SEARCH = "thorough"
PROMPTS = 256
SHOWN = 4


def run(experiment: Experiment) -> str:
    """Describe and verify every circuit; returns the report."""
    folder, stored_only = experiment.folder, experiment.stored_only
    parts = ["# What three circuits do, node by node", __doc__.strip().split("\n\n")[1]]
    for name, task_name in CIRCUITS:
        parts.append(f"## {task_name} in {name}")
        if stored_only and not training_summary(name, folder):
            parts.append("The model is not trained yet.")
            continue
        if stored_only and not stored_tasks([name], [task_name], folder, SEARCH):
            parts.append("Its circuits are not looked for yet.")
            continue
        parts.append(_circuit(name, task_name, folder))
    return "\n\n".join(parts)


def _circuit(name: str, task_name: str, folder: Path) -> str:
    model, tokenizer, _ = loaded(name, folder)
    task = task_for(name, task_name, folder, SEARCH)
    # The lowest target that the whole model reaches on held-out prompts; if it reaches none, the
    # highest, which the prompts that circuits are found with may still be done well enough for.
    learned = [t for t in TARGETS if task_name in learned_tasks(name, folder, t)]
    about = ""
    if not learned:
        score = task_losses(name, folder)[task_name]
        about = (
            f" The whole model has **not learned it** beyond the templates it was taught with: on "
            f"held-out prompts its loss, calibrated, is {score['calibrated_loss']:.3f}. The "
            "circuit is of what it does on the others."
        )
    rows = frontier(name, task_name, folder, [*learned, TARGETS[-1]][:1], SEARCH)
    if not rows:
        return f"No circuit reaches a loss of {TARGETS[-1]:g} nats on training prompts."
    target = min(row["target"] for row in rows)
    best = smallest(rows, target)
    found = stored_circuits(name, task_name, target, folder, SEARCH)
    circuit = next(c for c in found if c.config["seed"] == best["seed"])
    others = [c for c in found if c is not circuit]
    checks = "Not checked: there is hardly anything on held-out prompts for it to explain."
    if learned:
        verification = verify_circuit(circuit, model, task, others=others, prompts=PROMPTS)
        checks = (
            "Checks on held-out prompts, beside random circuits of equal size:\n\n"
            + verification.table()
        )
    m = circuit.metrics
    return "\n\n".join(
        [
            f"{task.description}{about}",
            f"{m['nodes']} nodes, {m['edges']} edges, found for a loss of {target:g}; the smallest "
            f"of {len(found)} seeds ({', '.join(str(c.metrics['edges']) for c in found)} edges), "
            f"{SEARCHES[SEARCH].max_steps} mask updates each. On held-out "
            f"prompts: loss {m['circuit_loss']:.3f}, accuracy {m['circuit_accuracy']:.1%}; the "
            f"whole model {m['model_loss']:.3f} and {m['model_accuracy']:.1%}.",
            _attention(circuit, model, tokenizer, task),
            describe_nodes(circuit, model, tokenizer, task),
            checks,
        ]
    )


def describe_nodes(circuit: Circuit, model: Any, tokenizer: Any, task: Any) -> str:
    """A Markdown table with a row for every node, in the order of computation."""
    prompts = task.train[:PROMPTS]["input_ids"]
    rows = {k: v[:PROMPTS] for k, v in task.tensors("train").items()}
    excited = excitement(circuit, model, prompts)
    nodes = [(site, index) for site in circuit.means for index in circuit.nodes.get(site, [])]
    effects = node_effects(circuit, model, rows, nodes)
    links = layered_graph(circuit, model).links
    lines = []
    for site, index in nodes:
        means, head = excited[site, index], index // model.config.head_dim
        reads = [(link.source, link) for link in links if link.target == (site, index)]
        writes = [(link.target, link) for link in links if link.source == (site, index)]
        high = sorted(means, key=means.__getitem__, reverse=True)[:SHOWN]
        low = sorted(means, key=means.__getitem__)[:SHOWN]
        spread = 0.2 * max((abs(v) for v in means.values()), default=0.0)
        lines.append(
            {
                "node": f"{site}.{index}",
                "excited by": _listed(tokenizer, [t for t in high if means[t] > spread], means),
                "inhibited by": _listed(tokenizer, [t for t in low if means[t] < -spread], means),
                "reads": _ends(tokenizer, reads),
                "writes": _ends(tokenizer, writes) or f"attention scores of head {head}",
                "ablating it adds": f"{effects[site, index]:.2f}",
            }
        )
    return (
        "Activations are deviations from the node's mean, averaged over the occurrences of a token "
        f"in {len(prompts)} training prompts, in the whole model; the last column is in nats.\n\n"
        + table(lines)
    )


def excitement(
    circuit: Circuit, model: Any, prompts: list[list[int]]
) -> dict[tuple[str, int], dict[int, float]]:
    """(site, index) → token id → mean deviation from the node's mean where the token stands."""
    recorded = record_activations(model, circuit.nodes, prompts)
    ids = torch.tensor([token for prompt in prompts for token in prompt])
    result: dict[tuple[str, int], dict[int, float]] = defaultdict(dict)
    for site, nodes in circuit.nodes.items():
        deviations = recorded.values[site] - circuit.means[site][nodes]
        for token in ids.unique().tolist():
            at = deviations[ids == token]
            if len(at) >= 3:
                for index, value in zip(nodes, at.mean(0).tolist(), strict=True):
                    result[site, index][token] = value
    return result


def _attention(circuit: Circuit, model: Any, tokenizer: Any, task: Any) -> str:
    """Where the circuit's heads look from the last position."""
    heads = sorted(
        {
            (int(site.split(".")[1]), index // model.config.head_dim)
            for site, nodes in circuit.nodes.items()
            if site.endswith((".q", ".k", ".v"))
            for index in nodes
        }
    )
    if not heads:
        return "No attention head takes part."
    prompts = task.test[:64]["input_ids"]
    mass: dict[tuple[int, int], dict[int, float]] = {head: defaultdict(float) for head in heads}
    for prompt in prompts:
        layers = sorted({layer for layer, _ in heads})
        patterns = attention_patterns(model, prompt, layers, partial(circuit.apply, model))
        for layer, head in heads:
            for token, weight in zip(prompt, patterns[layer][head, -1].tolist(), strict=True):
                mass[layer, head][token] += weight / len(prompts)
    lines = []
    for (layer, head), seen in mass.items():
        most = sorted(seen, key=seen.__getitem__, reverse=True)[:SHOWN]
        lines.append(
            f"- Head {head} of layer {layer}, from the last position: "
            f"{_listed(tokenizer, most, seen, sign=False)}; {1 - sum(seen.values()):.2f} into the "
            "sink."
        )
    return "Attention within the circuit, mean over held-out prompts:\n\n" + "\n".join(lines)


def _ends(tokenizer: Any, links: list[tuple[Key, GraphLink]]) -> str:
    """What stands at the other ends of a node's links: nodes, and tokens with their weights."""
    shown = []
    for (site, index), link in links:
        if site in ("token", "answer"):
            shown.append(f"{site} {_listed(tokenizer, [index], {index: link.weight})}")
        else:
            weight = f"{link.weight:+.2f} · " if link.kind == "weight" else ""
            shown.append(f"{weight}{site.removeprefix('h.')}.{index}")
    return ", ".join(shown)


def _listed(tokenizer: Any, ids: list[int], values: Mapping[int, float], sign: bool = True) -> str:
    """Tokens as Markdown code with their numbers; safe inside a table."""
    shown = []
    for token in ids:
        text = repr(tokenizer.decode([token])).replace("|", "¦").replace("`", "ˋ")
        shown.append(f"`{text}` {values[token]:{'+' if sign else ''}.2f}")
    return ", ".join(shown)


if __name__ == "__main__":
    main(run, __doc__, "circuit_anatomy")
