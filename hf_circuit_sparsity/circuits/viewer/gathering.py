"""Gathers everything a page shows about one circuit, as plain values for JSON."""

import math
import random
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ...tasks.binary_task import BinaryTask
from ..reference_tokens import ReferenceTokens, reference_input_ids
from .activations import Activations, extreme_examples, histogram, record_activations
from .attention import attention_patterns
from .embeddings import channel_embeddings
from .layout import Key, LayeredGraph, layered_graph
from .losses import (
    before_and_after,
    curve_sizes,
    nested_losses,
    node_effects,
    other_nodes,
    ranked_nodes,
)
from .settings import ReportConfig

if TYPE_CHECKING:
    from ..circuit import Circuit

PATTERN_TOKENS = 48
"""Tokens of a prompt, its last, whose attention is shown."""
LONGEST_TOKEN = 60
LONGEST_TEXT = 600


def shortened(text: str, longest: int = LONGEST_TEXT) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"


def _number(value: float) -> float:
    """Three significant digits: what a person reads, in a third of the bytes."""
    return float(f"{value:.3g}")


class Gathering:
    """One report in the making: its samples, and the tokens it has to name."""

    def __init__(
        self,
        circuit: "Circuit",
        model: nn.Module,
        tokenizer: Any,
        task: BinaryTask,
        config: ReportConfig,
        progress: bool,
    ):
        self.circuit, self.model, self.tokenizer = circuit, model, tokenizer
        self.task, self.config, self.progress = task, config, progress
        self.token_ids: set[int] = set()
        self.test_rows = self._sample(len(task.test))
        self.test = self._tensors("test", self.test_rows)

    def _sample(self, rows: int) -> list[int]:
        order = list(range(rows))
        random.Random(self.config.seed).shuffle(order)
        return order[: self.config.prompts]

    def _tensors(self, split: str, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        return {k: v[list(rows)] for k, v in self.task.tensors(split).items()}

    def _bar(self, what: str) -> Callable[[Iterable], Iterable]:
        return lambda items: tqdm(
            items, desc=what, disable=not self.progress, leave=False, dynamic_ncols=True
        )

    def run(self, reference: ReferenceTokens) -> dict[str, Any]:
        runs = before_and_after(self.circuit, self.model, self.test)
        for name, run in runs.items():
            if not math.isfinite(run.loss):
                raise ValueError(
                    f"The task loss of the run {name!r} is {run.loss}, so there is nothing to "
                    "measure; the model's weights or the circuit's means are damaged."
                )
        graph = layered_graph(self.circuit, self.model)
        keys = [key for key, node in graph.nodes.items() if node.kind != "token"]
        effects = node_effects(
            self.circuit, self.model, self.test, self._bar("ablating nodes")(keys)
        )
        order = ranked_nodes(self.circuit, effects)
        activations = self._activations(reference)
        data = {
            **self._facts(graph),
            "losses": {
                name: {"loss": _number(run.loss), "accuracy": _number(run.accuracy)}
                for name, run in runs.items()
            },
            "columns": [column._asdict() for column in graph.columns],
            "nodes": [self._node(graph, key, effects, order, activations) for key in graph.nodes],
            "links": self._links(graph),
            "heads": self._heads(graph),
            "curve": self._curve(order, runs["circuit"].loss),
            "channels": self._channels(),
            "sequences": [[ids for ids in recorded.input_ids] for recorded in activations.values()],
        }
        self._keep_shown_sequences(data)
        data["tokens"] = {
            str(token): shortened(self.tokenizer.decode([token]), LONGEST_TOKEN)
            for token in sorted(self.token_ids)
        }
        return data

    def _facts(self, graph: LayeredGraph) -> dict[str, Any]:
        circuit = self.circuit
        return {
            "task": shortened(circuit.task),
            "description": shortened(self.task.description),
            "model": shortened(circuit.model_name),
            "fingerprint": shortened(circuit.model_fingerprint),
            "example": self._example(),
            "size": {
                "nodes": len(circuit),
                "modelNodes": sum(len(mean) for mean in circuit.means.values()),
                "edges": sum(link.kind == "weight" for link in graph.links),
                "cutEdges": len(circuit.split_edges(self.model)[1]),
                "layers": self.model.config.n_layer,
                "width": self.model.config.d_model,
            },
            "samples": {"prompts": len(self.test_rows), "seed": self.config.seed},
            "checks": {
                shortened(name, 40): {key: _number(value) for key, value in check.items()}
                for name, check in circuit.verification.items()
            },
            "ranking": "mask score" if circuit.scores else "ablation effect",
        }

    def _prompt_pair(self) -> list[dict[str, Any]]:
        """The circuit's own example and its counterfactual, or the task's first."""
        row = {**self.task.test[0], **self._own_example()}
        sides = []
        for prefix, other in (("", "counterfactual_"), ("counterfactual_", "")):
            ids = row["counterfactual_input_ids" if prefix else "input_ids"]
            sides.append(
                {
                    "ids": [int(i) for i in ids],
                    "target": int(row[f"{prefix}target_id"]),
                    "other": int(row[f"{other}target_id"]),
                }
            )
        return sides

    def _own_example(self) -> dict[str, Any]:
        example = self.circuit.example
        names = ("token_ids", "counterfactual_token_ids", "target_id", "counterfactual_target_id")
        if not all(example.get(name) for name in names[:2]) or not set(names) <= set(example):
            return {}
        own = {name: example[name] for name in names[2:]}
        own["input_ids"], own["counterfactual_input_ids"] = (example[n] for n in names[:2])
        return own

    def _example(self) -> list[dict[str, Any]]:
        sides = self._prompt_pair()
        for side in sides:
            self.token_ids |= {*side["ids"], side["target"], side["other"]}
        return sides

    def _activations(self, reference: ReferenceTokens) -> dict[str, Activations]:
        """On the task with the circuit alone, on pretraining text with the whole model."""
        nodes = self.circuit.nodes
        rows = self.task.test["input_ids"]
        prompts = [[int(i) for i in rows[row]] for row in self.test_rows]
        text = reference_input_ids(
            self.model, self.tokenizer, reference, self.config.text_tokens
        ).tolist()
        return {
            "task": record_activations(
                self.model,
                nodes,
                prompts,
                within=lambda: self.circuit.apply(self.model),
                wrap=self._bar("activations on the task"),
            ),
            "text": record_activations(
                self.model, nodes, text, wrap=self._bar("activations on text")
            ),
        }

    def _node(
        self,
        graph: LayeredGraph,
        key: Key,
        effects: dict[Key, float],
        order: list[Key],
        activations: dict[str, Activations],
    ) -> dict[str, Any]:
        node = graph.nodes[key]
        site, index = key
        shown: dict[str, Any] = {
            "site": site,
            "index": index,
            "kind": node.kind,
            "column": node.column,
            "row": _number(graph.rows[key]),
        }
        if node.kind == "token":
            self.token_ids.add(index)
            return shown
        if node.head is not None:
            shown["head"] = node.head
        if self.circuit.scores:
            shown["score"] = _number(self.circuit.scores[site][index].item())
        place = self.circuit.nodes[site].index(index)
        columns = {name: a.values[site][:, place] for name, a in activations.items()}
        low = min(column.min().item() for column in columns.values())
        high = max(column.max().item() for column in columns.values())
        mean = self.circuit.means[site][index].item()
        shown |= {
            "effect": _number(effects[key]),
            "rank": order.index(key),
            "mean": _number(mean),
            "low": _number(low),
            "high": _number(high),
            "histograms": {name: histogram(c, low, high) for name, c in columns.items()},
            "examples": {
                name: {
                    end: [
                        [e.sequence, e.start, e.at, [_number(v) for v in e.values]]
                        for e in extreme_examples(
                            recorded, site, place, mean, self.config.examples, sign
                        )
                    ]
                    for end, sign in (("top", 1), ("bottom", -1))
                }
                for name, recorded in activations.items()
            },
        }
        return shown

    def _links(self, graph: LayeredGraph) -> list[list[Any]]:
        places = {key: place for place, key in enumerate(graph.nodes)}
        return [
            [places[link.source], places[link.target], _number(link.weight), link.kind]
            for link in graph.links
        ]

    def _heads(self, graph: LayeredGraph) -> dict[str, Any]:
        """Patterns of every head with a node in the circuit, on two pairs of prompts."""
        heads = sorted(
            {
                (int(key[0].split(".")[1]), node.head)
                for key, node in graph.nodes.items()
                if node.head is not None
            }
        )
        if not heads:
            return {"prompts": [], "heads": []}
        prompts = [side["ids"] for side in self._prompt_pair()]
        for row in self.test_rows[:2]:
            prompts.append([int(i) for i in self.task.test[row]["input_ids"]])
        prompts = [p for i, p in enumerate(prompts) if p not in prompts[:i]]
        layers = sorted({layer for layer, _ in heads})
        patterns: dict[tuple[int, int], dict[str, list]] = {
            head: {"circuit": [], "model": []} for head in heads
        }
        for ids in prompts:
            for run, within in (
                ("circuit", lambda: self.circuit.apply(self.model)),
                ("model", None),
            ):
                arguments = (self.model, ids, layers, *([within] if within else []))
                found = attention_patterns(*arguments)
                for layer, head in heads:
                    square = found[layer][head][-PATTERN_TOKENS:, -PATTERN_TOKENS:]
                    # Per mille, and only what causality allows.
                    lower = [(1000 * row[: i + 1]).round().int() for i, row in enumerate(square)]
                    patterns[layer, head][run].append(torch.cat(lower).tolist())
        shown = [ids[-PATTERN_TOKENS:] for ids in prompts]
        for ids in shown:
            self.token_ids.update(ids)
        return {
            "prompts": shown,
            "heads": [
                {"layer": layer, "head": head, **patterns[layer, head]} for layer, head in heads
            ],
        }

    def _curve(self, order: list[Key], circuit_loss: float) -> dict[str, Any]:
        """Loss of the circuit's best nodes, then of more; and of the best of all by score alone."""
        rows = self._sample(len(self.task.train))[: self.config.calibration_prompts]
        train = self._tensors("train", rows)
        others = other_nodes(self.circuit)
        sizes = curve_sizes(len(order), len(order) + len(others))

        def losses(nodes: list[Key], at: list[int], what: str) -> list[float]:
            bar = self._bar(what)(at)
            found = nested_losses(self.circuit, self.model, nodes, bar, train, self.test)
            return [_number(loss) for loss in found]

        curve = {
            "sizes": sizes,
            "losses": losses([*order, *others], sizes, "smaller and larger circuits"),
            "order": [list(key) for key in order],
        }
        # The circuit itself has a calibration of its own.
        curve["losses"][sizes.index(len(order))] = _number(circuit_loss)
        if self.circuit.scores:
            scores = {site: score.tolist() for site, score in self.circuit.scores.items()}
            ranked = sorted(
                [*order, *others], key=lambda node: scores[node[0]][node[1]], reverse=True
            )
            larger = [size for size in sizes if size >= len(order)]
            curve["byScore"] = losses(ranked, larger, "circuits by mask score alone")
            curve["byScoreSizes"] = larger
        return curve

    def _channels(self) -> list[dict[str, Any]]:
        channels = channel_embeddings(self.model, self.circuit.nodes)
        for entry in channels:
            for table in ("embed", "unembed"):
                for end in ("positive", "negative"):
                    pairs = entry.get(table, {}).get(end, [])
                    self.token_ids.update(token for token, _ in pairs)
                    if pairs:
                        entry[table][end] = [[token, _number(w)] for token, w in pairs]
            if "position" in entry:
                entry["position"] = [_number(w) for w in entry["position"]]
        return channels

    def _keep_shown_sequences(self, data: dict[str, Any]) -> None:
        """Only stretches of sequences that some example shows go into the page."""
        shown: dict[str, dict[int, int]] = {"task": {}, "text": {}}
        stored: dict[str, list[list[int]]] = {"task": [], "text": []}
        all_sequences = dict(zip(("task", "text"), data["sequences"], strict=True))
        for node in data["nodes"]:
            for name, ends in node.get("examples", {}).items():
                for examples in ends.values():
                    for example in examples:
                        sequence, start, _, values = example
                        if sequence not in shown[name]:
                            shown[name][sequence] = len(stored[name])
                            stored[name].append(all_sequences[name][sequence])
                        example[0] = shown[name][sequence]
                        ids = all_sequences[name][sequence][start : start + len(values)]
                        self.token_ids.update(ids)
        data["sequences"] = stored
