"""Everything a page shows about one circuit, measured and put into plain values for JSON."""

import math
import random
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ...tasks.binary_task import BinaryTask
from ..ablation import ReferenceTokens, in_eval_mode, reference_input_ids, unwrapped
from ..attention import attention_patterns
from ..circuit import Circuit
from ..evaluation.verdict import verdict
from ..node_effects import node_effects
from ..node_set import node_text
from ..pruning.find import task_example
from ..task_scores import task_rows
from .activations import Activations, Example, extreme_examples, histogram, record_activations
from .layout import Key, LayeredGraph, layered_graph
from .measurements import (
    before_and_after,
    by_score,
    channel_embeddings,
    curve_sizes,
    nested_losses,
    other_nodes,
)

PATTERN_TOKENS = 48
"""Tokens of a prompt, its last, whose attention is shown."""
LONGEST_TOKEN = 60
LONGEST_TEXT = 600


@dataclass(frozen=True)
class ReportConfig:
    """Sizes of the samples behind a page, and of what it shows of them."""

    prompts: int = 512
    """Held-out prompts on which losses, ablation effects and activations are measured; all of a
    built-in task's, so that the losses are those that `find_circuit` reports."""
    text_tokens: int = 16384
    """Tokens of pretraining text over which activations are taken."""
    examples: int = 5
    """Examples shown at either end of a node's activations."""
    seed: int = 0
    """Of the choice of prompts; and of the task, where none is passed and the circuit names no
    seed of its own."""

    def __post_init__(self) -> None:
        for name in ("prompts", "text_tokens", "examples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} was passed, but it must be ≥ 1.")


def report_data(
    circuit: Circuit,
    model: nn.Module,
    tokenizer: Any,
    *,
    task: BinaryTask | None = None,
    reference: ReferenceTokens = None,
    config: ReportConfig | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """All that the page of a circuit shows, as plain values; arguments as of [`write_report`]."""
    config = config or ReportConfig()
    circuit.check_model(model)
    model = unwrapped(model)
    if not len(circuit):
        raise ValueError(
            f"The circuit for {circuit.task!r} has no nodes, so there is nothing to show; find one "
            "with find_circuit."
        )
    with in_eval_mode(model):
        attention_patterns(model, [0, 0], [0])  # refused before the long measurements
        if task is None:
            longest = model.config.max_position_embeddings
            task = circuit.load_task(tokenizer, seed=config.seed, max_length=longest)
        return _rounded(_Report(circuit, model, tokenizer, task, config, progress).data(reference))


def _shortened(text: str, longest: int = LONGEST_TEXT) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"


def _rounded(value: Any) -> Any:
    """Every number to three significant digits: what a person reads, in a third of the bytes."""
    if isinstance(value, Mapping):
        return {name: _rounded(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return float(f"{value:.3g}") if isinstance(value, float) else value


@dataclass
class _Report:
    """One report in the making: its samples, and the tokens and sequences it shows."""

    circuit: Circuit
    model: nn.Module
    tokenizer: Any
    task: BinaryTask
    config: ReportConfig
    progress: bool

    def __post_init__(self) -> None:
        rows = list(range(len(self.task.test)))
        random.Random(self.config.seed).shuffle(rows)
        self.test_rows = rows[: self.config.prompts]
        self.test = task_rows(self.task.tensors("test"), self.test_rows)
        self.prompt_pair = self._prompt_pair()
        self.token_ids: set[int] = set()
        # By distribution: sequences that some example shows → their numbers on the page.
        self.sequences: dict[str, dict[int, int]] = {"task": {}, "text": {}}

    def _bar(self, what: str) -> Callable[[Iterable], Iterable]:
        return lambda items: tqdm(
            items, desc=what, disable=not self.progress, leave=False, dynamic_ncols=True
        )

    def data(self, reference: ReferenceTokens) -> dict[str, Any]:
        circuit, model = self.circuit, self.model
        runs = before_and_after(circuit, model, self.test)
        for name, run in runs.items():
            if not math.isfinite(run["loss"]):
                raise ValueError(
                    f"The task loss of the run {name!r} is {run['loss']}, so there is nothing to "
                    "measure; the model's weights or the circuit's means are damaged."
                )
        graph = layered_graph(circuit, model)
        keys = [key for key, node in graph.nodes.items() if node.kind != "token"]
        effects = node_effects(circuit, model, self.test, self._bar("ablating nodes")(keys))
        order = by_score(circuit, effects)
        if not circuit.scores:  # by ablation effect, where no mask was learned
            order = sorted(effects, key=effects.__getitem__, reverse=True)
        activations = self._activations(reference)
        positions = {key: position for position, key in enumerate(graph.nodes)}
        data = {
            **self._facts(graph),
            "losses": runs,
            "columns": [column._asdict() for column in graph.columns],
            "nodes": [self._node(graph, key, effects, order, activations) for key in graph.nodes],
            "links": [
                [positions[link.source], positions[link.target], *link[2:]] for link in graph.links
            ],
            "heads": self._heads(graph),
            "curve": self._curve(order, runs["circuit"]["loss"]),
            "channels": self._channels(),
            "sequences": {
                name: [activations[name].input_ids[sequence] for sequence in numbers]
                for name, numbers in self.sequences.items()
            },
        }
        data["tokens"] = {
            str(token): _shortened(self.tokenizer.decode([token]), LONGEST_TOKEN)
            for token in sorted(self.token_ids)
        }
        return data

    def _facts(self, graph: LayeredGraph) -> dict[str, Any]:
        circuit = self.circuit
        for side in self.prompt_pair:
            self.token_ids |= {*side["ids"], side["target"], side["other"]}
        return {
            "task": _shortened(circuit.task),
            "description": _shortened(self.task.description),
            "model": _shortened(circuit.model_name),
            "fingerprint": _shortened(circuit.model_fingerprint),
            "example": self.prompt_pair,
            "size": {
                "nodes": len(circuit),
                "modelNodes": sum(len(mean) for mean in circuit.means.values()),
                "edges": sum(link.kind == "weight" for link in graph.links),
                "cutEdges": graph.cut_edges,
                "layers": self.model.config.num_hidden_layers,
                "width": self.model.config.hidden_size,
            },
            "samples": {"prompts": len(self.test_rows), "seed": self.config.seed},
            "checks": {_shortened(name, 40): check for name, check in circuit.verification.items()},
            "verdict": _shortened(verdict(circuit.verification), 2000),
            "ranking": "mask score" if circuit.scores else "ablation effect",
        }

    def _prompt_pair(self) -> list[dict[str, Any]]:
        """The circuit's own example and its counterfactual; the task's first if it has none."""
        sides = ("", "counterfactual_")
        example = self.circuit.example
        named = [example.get(f"{side}token_ids") for side in sides]
        if not all(named) or not all(f"{side}target_id" in example for side in sides):
            example = task_example(self.task)
        return [
            {
                "ids": example[f"{side}token_ids"],
                "target": example[f"{side}target_id"],
                "other": example[f"{other}target_id"],
            }
            for side, other in (sides, sides[::-1])
        ]

    def _activations(self, reference: ReferenceTokens) -> dict[str, Activations]:
        """On the task with the circuit alone, on pretraining text with the whole model."""
        nodes = self.circuit.nodes
        prompts = [list(ids) for ids in self.task.test[self.test_rows]["input_ids"]]
        text = reference_input_ids(
            self.model, self.tokenizer, reference, self.config.text_tokens, self.progress
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
        effects: Mapping[Key, float],
        order: list[Key],
        activations: Mapping[str, Activations],
    ) -> dict[str, Any]:
        node = graph.nodes[key]
        site, index = key
        shown: dict[str, Any] = {
            "site": site,
            "index": index,
            "kind": node.kind,
            "column": node.column,
            "row": graph.rows[key],
        }
        if node.kind == "token":
            self.token_ids.add(index)
            return shown
        if node.head is not None:
            shown["head"] = node.head
        for field, of_nodes in (("name", self.circuit.names), ("note", self.circuit.notes)):
            if text := of_nodes.get(node_text(key)):
                shown[field] = text
        if self.circuit.scores:
            shown["score"] = self.circuit.scores[site][index].item()
        column = self.circuit.nodes[site].index(index)
        columns = {name: a.values[site][:, column] for name, a in activations.items()}
        low = min(c.min().item() for c in columns.values())
        high = max(c.max().item() for c in columns.values())
        mean = self.circuit.means[site][index].item()
        return shown | {
            "effect": effects[key],
            "rank": order.index(key),
            "mean": mean,
            "low": low,
            "high": high,
            "histograms": {name: histogram(c, low, high) for name, c in columns.items()},
            "examples": {
                name: {
                    end: [
                        self._example(name, recorded, example)
                        for example in extreme_examples(
                            recorded, site, column, mean, self.config.examples, sign
                        )
                    ]
                    for end, sign in (("top", 1), ("bottom", -1))
                }
                for name, recorded in activations.items()
            },
        }

    def _example(self, name: str, recorded: Activations, example: Example) -> list[Any]:
        numbers = self.sequences[name]
        number = numbers.setdefault(example.sequence, len(numbers))
        stop = example.start + len(example.values)
        self.token_ids.update(recorded.input_ids[example.sequence][example.start : stop])
        return [number, example.start, example.at, example.values]

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
        prompts = [side["ids"] for side in self.prompt_pair]
        prompts += [list(ids) for ids in self.task.test[self.test_rows[:2]]["input_ids"]]
        prompts = [p for i, p in enumerate(prompts) if p not in prompts[:i]]
        layers = sorted({layer for layer, _ in heads})
        patterns: dict[tuple[int, int], dict[str, list]] = {
            head: {"circuit": [], "model": []} for head in heads
        }
        for ids in prompts:
            for run, within in (
                ("circuit", lambda: self.circuit.apply(self.model)),
                ("model", nullcontext),
            ):
                weights = attention_patterns(self.model, ids, layers, within)
                for layer, head in heads:
                    square = weights[layer][head][-PATTERN_TOKENS:, -PATTERN_TOKENS:]
                    # Per mille, and only what causality allows.
                    lower = [(1000 * row[: i + 1]).round().int() for i, row in enumerate(square)]
                    patterns[layer, head][run].append(torch.cat(lower).tolist())
        shown = [ids[-PATTERN_TOKENS:] for ids in prompts]
        self.token_ids.update(*shown)
        return {
            "prompts": shown,
            "heads": [
                {"layer": layer, "head": head, **patterns[layer, head]} for layer, head in heads
            ],
        }

    def _curve(self, order: list[Key], circuit_loss: float) -> dict[str, Any]:
        """Loss of the circuit's best nodes, then of more; and of the best of all by score alone."""
        others = other_nodes(self.circuit)
        sizes = curve_sizes(len(order), len(order) + len(others))

        def losses(nodes: list[Key], at: list[int], what: str) -> list[float]:
            bar = self._bar(what)(at)
            return nested_losses(self.circuit, self.model, nodes, bar, self.test)

        curve = {
            "sizes": sizes,
            "losses": losses([*order, *others], sizes, "smaller and larger circuits"),
            "order": [list(key) for key in order],
        }
        # The circuit itself has a calibration of its own.
        curve["losses"][sizes.index(len(order))] = circuit_loss
        if self.circuit.scores:
            ranked = by_score(self.circuit, [*order, *others])
            larger = [size for size in sizes if size >= len(order)]
            curve["byScore"] = losses(ranked, larger, "circuits by mask score alone")
            curve["byScoreSizes"] = larger
        return curve

    def _channels(self) -> list[dict[str, Any]]:
        channels = channel_embeddings(self.model, self.circuit.nodes)
        for entry in channels:
            for table in (entry.get("embed", {}), entry.get("unembed", {})):
                for end in ("positive", "negative"):
                    self.token_ids.update(token for token, _ in table.get(end, []))
        return channels
