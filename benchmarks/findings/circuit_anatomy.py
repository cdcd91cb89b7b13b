"""What circuits do, node by node: which tokens excite a node, what its weights read and write.

The quote circuit is that of a model trained on the Python standard library alone. That corpus is
too small to teach such a model bracket counting and set or string, so their circuits are from one
a quarter of whose text was these tasks' training prompts, answered.
"""

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from hf_circuit_sparsity.circuits.ablation import hooked_sites
from hf_circuit_sparsity.circuits.circuit import Circuit
from hf_circuit_sparsity.circuits.edges import Edge, embedding_edges, unembedding_edges
from hf_circuit_sparsity.circuits.task_loss import all_pair_logits, binary_loss, candidates, trimmed

from ..speed.measure import table
from .findings import (
    SEARCHES,
    TARGETS,
    arguments,
    frontier,
    learned_tasks,
    loaded,
    smallest,
    stored_circuits,
    stored_tasks,
    task_for,
    task_losses,
    write_report,
)
from .trained_models import FOLDER, training_summary

CIRCUITS = (
    ("topk-128-seed0", "single_double_quote"),
    ("taught-64-seed0", "bracket_counting"),
    ("taught-64-seed0", "set_or_string"),
)
SEARCH = "thorough"
PROMPTS = 256
SHOWN = 4


def run(folder: Path = FOLDER, stored_only: bool = False) -> str:
    """Describe and verify every circuit; returns the report."""
    paragraph = __doc__.split("\n\n")[1]
    parts = ["# What three circuits do, node by node", paragraph]
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
        verification = circuit.verify(model, tokenizer, task, others=others, prompts=PROMPTS)
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
            f"{SEARCHES[SEARCH].steps} mask updates each. On held-out "
            f"prompts: loss {m['circuit_loss']:.3f}, accuracy {m['circuit_accuracy']:.1%}; the "
            f"whole model {m['model_loss']:.3f} and {m['model_accuracy']:.1%}.",
            _attention(circuit, model, tokenizer, task),
            describe_nodes(circuit, model, tokenizer, task),
            checks,
        ]
    )


def describe_nodes(circuit: Circuit, model: Any, tokenizer: Any, task: Any) -> str:
    """A Markdown table with a row for every node, in the order of computation."""
    rows = {k: v[:PROMPTS] for k, v in task.tensors("train").items()}
    excited = _tokens(circuit, model, rows)
    edges = circuit.edges(model)
    without = _removals(circuit, model, rows)
    tokens = sorted({t for t in rows["input_ids"][rows["attention_mask"].bool()].tolist()})
    answers = sorted(set(candidates(rows).flatten().tolist()))
    lines = []
    for site in circuit.means:
        for index in circuit.nodes.get(site, []):
            means = excited[site, index]
            high = sorted(means, key=means.get, reverse=True)[:SHOWN]
            low = sorted(means, key=means.get)[:SHOWN]
            spread = 0.2 * max((abs(v) for v in means.values()), default=0.0)
            lines.append(
                (
                    f"{site}.{index}",
                    _listed(tokenizer, [t for t in high if means[t] > spread], means),
                    _listed(tokenizer, [t for t in low if means[t] < -spread], means),
                    _reads(circuit, model, tokenizer, site, index, edges, tokens),
                    _writes(circuit, model, tokenizer, site, index, edges, answers),
                    f"{without[site, index]:.2f}",
                )
            )
    header = ("node", "excited by", "inhibited by", "reads", "writes", "loss without it")
    return (
        "Activations are deviations from the node's mean, averaged over the occurrences of a token "
        f"in {len(rows['target_ids'])} training prompts, in the whole model.\n\n"
        + table(header, lines)
    )


def _tokens(
    circuit: Circuit, model: Any, rows: dict[str, torch.Tensor]
) -> dict[tuple[str, int], dict[int, float]]:
    """(site, index) → token id → mean deviation from the node's mean where the token stands."""
    seen: dict[str, torch.Tensor] = {}

    def recorder(site: str):
        def hook(module, args, output):
            seen[site] = output[..., circuit.nodes[site]]

        return hook

    batch = trimmed(rows)
    with torch.no_grad(), hooked_sites(model, {s: recorder(s) for s in circuit.nodes}):
        model(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    here = batch["attention_mask"].bool()
    ids = batch["input_ids"][here]
    result: dict[tuple[str, int], dict[int, float]] = defaultdict(dict)
    for site, values in seen.items():
        deviations = values[here] - circuit.means[site][circuit.nodes[site]]
        for token in ids.unique().tolist():
            at = deviations[ids == token]
            if len(at) >= 3:
                for index, mean in zip(circuit.nodes[site], at.mean(0).tolist(), strict=True):
                    result[site, index][token] = mean
    return result


def _removals(
    circuit: Circuit, model: Any, rows: dict[str, torch.Tensor]
) -> dict[tuple[str, int], float]:
    """Loss of the circuit without each of its nodes."""
    losses = {}
    for site, ids in circuit.nodes.items():
        for index in ids:
            smaller = Circuit(
                {**circuit.nodes, site: [i for i in ids if i != index]},
                circuit.means,
                circuit.task,
                circuit.model_fingerprint,
                calibration=circuit.calibration,
            )
            with smaller.applied(model):
                losses[site, index] = binary_loss(all_pair_logits(model, rows)).item()
    return losses


def _attention(circuit: Circuit, model: Any, tokenizer: Any, task: Any) -> str:
    """Where the circuit's heads look from the last position."""
    width = model.config.head_dim
    heads = sorted(
        {
            (int(site.split(".")[1]), index // width)
            for site, ids in circuit.nodes.items()
            if site.endswith((".q", ".k", ".v"))
            for index in ids
        }
    )
    if not heads:
        return "No attention head takes part."
    batch = trimmed({k: v[:64] for k, v in task.tensors("test").items()})
    before = model.config._attn_implementation
    model.config._attn_implementation = "eager"
    try:
        with torch.no_grad(), circuit.applied(model):
            attentions = model(
                batch["input_ids"],
                attention_mask=batch["attention_mask"],
                use_cache=False,
                output_attentions=True,
            ).attentions
    finally:
        model.config._attn_implementation = before
    lines = []
    for layer, head in heads:
        weights = attentions[layer][:, head, -1]  # (prompts, positions)
        mass: dict[int, float] = defaultdict(float)
        for ids, row in zip(batch["input_ids"].tolist(), weights.tolist(), strict=True):
            for token, weight in zip(ids, row, strict=True):
                mass[token] += weight / len(weights)
        most = sorted(mass, key=mass.get, reverse=True)[:SHOWN]
        total = sum(mass.values())
        lines.append(
            f"- Head {head} of layer {layer}, from the last position: "
            f"{_listed(tokenizer, most, mass, sign=False)}; {1 - total:.2f} into the sink."
        )
    return "Attention within the circuit, mean over held-out prompts:\n\n" + "\n".join(lines)


def _reads(
    circuit: Circuit, model: Any, tokenizer: Any, site: str, index: int, edges: list[Edge],
    tokens: list[int],
) -> str:  # fmt: skip
    if site.endswith("act_in"):
        written = [
            f"{other}.{index}"
            for other in _before(circuit, site)
            if other.endswith("resid_delta") and index in circuit.nodes[other]
        ]
        weights = {t: w for t, _, w in embedding_edges(model, {site: [index]}, tokens)}
        strongest = sorted(weights, key=lambda t: -abs(weights[t]))[:SHOWN]
        parts = [f"embedding of {_listed(tokenizer, strongest, weights)}"] if strongest else []
        return "; ".join([*written, *parts])
    return ", ".join(
        f"{e.weight:+.2f} · {_short(e.source_site)}.{e.source}"
        for e in edges
        if (e.target_site, e.target) == (site, index)
    )


def _writes(
    circuit: Circuit, model: Any, tokenizer: Any, site: str, index: int, edges: list[Edge],
    answers: list[int],
) -> str:  # fmt: skip
    if site.endswith("resid_delta"):
        read = [
            f"{other}.{index}"
            for other in circuit.nodes
            if other.endswith("act_in")
            and site in _before(circuit, other)
            and index in circuit.nodes[other]
        ]
        weights = {t: w for _, t, w in unembedding_edges(model, {site: [index]}, answers)}
        strongest = sorted(weights, key=lambda t: -abs(weights[t]))[:SHOWN]
        parts = [f"logit of {_listed(tokenizer, strongest, weights)}"] if strongest else []
        return "; ".join([*read, *parts])
    if site.endswith((".q", ".k")):
        head = index // model.config.head_dim
        return f"attention scores of head {head}"
    return ", ".join(
        f"{e.weight:+.2f} → {_short(e.target_site)}.{e.target}"
        for e in edges
        if (e.source_site, e.source) == (site, index)
    )


def _before(circuit: Circuit, site: str) -> list[str]:
    """The circuit's sites that are computed before this one."""
    order = list(circuit.means)
    return [s for s in order[: order.index(site)] if s in circuit.nodes]


def _short(site: str) -> str:
    return site.split(".", 2)[2]


def _listed(tokenizer: Any, ids: list[int], values: dict[int, float], sign: bool = True) -> str:
    """Tokens as Markdown code with their numbers; safe inside a table."""
    shown = []
    for token in ids:
        text = repr(tokenizer.decode([token])).replace("|", "¦").replace("`", "ˋ")
        shown.append(f"`{text}` {values[token]:{'+' if sign else ''}.2f}")
    return ", ".join(shown)


if __name__ == "__main__":
    args = arguments(__doc__)
    write_report(args.results, "circuit_anatomy", run(args.folder, args.stored_only))
