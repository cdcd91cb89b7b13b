"""Everything a page shows about one circuit, measured and put into plain values for JSON."""

import math
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ...tasks.binary_task import BinaryTask
from ..ablation import (
    ReferenceTokens,
    measuring,
    reference_input_ids,
    reference_means,
    unwrapped,
)
from ..attention import attention_patterns
from ..circuit import Circuit
from ..evaluation.verdict import verdict
from ..node_effects import node_effects
from ..node_set import node_text
from ..task_scores import binary_accuracy, binary_loss, task_rows
from .activations import (
    QUANTILES,
    Activations,
    Example,
    extreme_examples,
    histogram,
    quantile_examples,
    record_activations,
)
from .layout import Key, LayeredGraph, layered_graph
from .measurements import (
    before_and_after,
    by_score,
    channel_embeddings,
    curve_sizes,
    edge_effects,
    nested_losses,
    other_nodes,
)
from .pairs import PAIR_TOKENS, channel_scale, head_patterns, predictions, strongest, task_pairs
from .positions import position_effects, token_weights

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
    pairs: int = 4
    """Prompts with their counterfactuals to choose from: the circuit's own and held-out ones."""
    edges: int = 100
    """Weights whose ablation effect is measured, the strongest."""
    seed: int = 0
    """Of the choice of prompts; and of the task, where none is passed and the circuit names no
    seed of its own."""
    files: int = 64
    """Files of the Python standard library that the text is taken from where no reference is
    passed, drawn at random and always the same ones."""

    def __post_init__(self) -> None:
        for name in ("prompts", "text_tokens", "files", "examples", "pairs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} was passed, but it must be ≥ 1.")
        if self.edges < 0:
            raise ValueError(f"edges={self.edges} was passed, but it must be ≥ 0.")


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
    with measuring(model):
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
        self.pairs = task_pairs(self.circuit, self.task, self.test_rows, self.config.pairs)
        self.token_ids: set[int] = set()
        # By distribution: sequences that some example shows → their numbers on the page.
        self.sequences: dict[str, dict[int, int]] = {"task": {}, "text": {}}

    def _bar(self, what: str) -> Callable[[Iterable], Iterable]:
        return lambda items: tqdm(
            items, desc=what, disable=not self.progress, leave=False, dynamic_ncols=True
        )

    def data(self, reference: ReferenceTokens) -> dict[str, Any]:
        circuit, model = self.circuit, self.model
        pairs = before_and_after(circuit, model, self.test)
        runs = {
            name: {"loss": binary_loss(of_run).item(), "accuracy": binary_accuracy(of_run)}
            for name, of_run in pairs.items()
        }
        for name, run in runs.items():
            if not math.isfinite(run["loss"]):
                raise ValueError(
                    f"The task loss of the run {name!r} is {run['loss']}, so there is nothing to "
                    "measure; the model's weights or the circuit's means are damaged."
                )
        graph = layered_graph(circuit, model)
        keys = [key for key, node in graph.nodes.items() if node.kind != "token"]
        effects = node_effects(circuit, model, self.test, self._bar("ablating nodes")(keys))
        order = sorted(effects, key=effects.__getitem__, reverse=True)
        text = reference_input_ids(
            model, self.tokenizer, reference, self.config.text_tokens, self.progress,
            files=self.config.files,
        )  # fmt: skip
        cut = self._edge_effects(text)
        activations = self._activations(text)
        by_token = self._by_token(keys)
        positions = {key: position for position, key in enumerate(graph.nodes)}
        data = {
            **self._facts(graph),
            "pairs": [[self._side(side) for side in pair] for pair in self.pairs],
            "quantiles": QUANTILES,
            "losses": runs,
            "columns": [column._asdict() for column in graph.columns],
            "nodes": [
                self._node(graph, key, effects, order, activations)
                | ({"byToken": by_token[key]} if key in by_token else {})
                for key in graph.nodes
            ],
            "links": [
                [
                    *(positions[link.source], positions[link.target]),
                    *(link.weight, link.kind, link.via),
                    cut.get((*link.source, *link.target)) if link.kind == "weight" else None,
                    link.head,
                ]
                for link in graph.links
            ],
            "heads": self._heads(graph),
            "curve": self._curve(order, runs["circuit"]["loss"], pairs["model"]),
            "channels": self._channels(),
            "tokenWeights": token_weights(
                circuit,
                model,
                (token for side in self._sides() for token in side["ids"]),
                (side[answer] for side in self._sides() for answer in ("target", "other")),
            ),
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
        return {
            "task": _shortened(circuit.task),
            "description": _shortened(self.task.description),
            "model": _shortened(circuit.model_name),
            "fingerprint": _shortened(circuit.model_fingerprint),
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
        }

    def _side(self, side: dict[str, Any]) -> dict[str, Any]:
        """A prompt with the likeliest next tokens, and the probabilities of the two answers."""
        runs = predictions(self.circuit, self.model, side["ids"])
        answers = [side["target"], side["other"]]
        top = {run: strongest(probabilities) for run, probabilities in runs.items()}
        named = {token for tokens in top.values() for token, _ in tokens}
        self.token_ids |= {*side["ids"], *answers, *named}
        return {
            **side,
            "predicted": top,
            "answers": {
                run: probabilities[answers].tolist() for run, probabilities in runs.items()
            },
        }

    def _sides(self) -> list[dict[str, Any]]:
        """Of all pairs, one after the other."""
        return [side for pair in self.pairs for side in pair]

    def _by_token(self, keys: list[Key]) -> dict[Key, list[list[float]]]:
        """Node → what it does at the last tokens of every side of every pair, in logits."""
        effects: dict[Key, list[list[float]]] = {key: [] for key in keys}
        for side in self._bar("nodes at single tokens")(self._sides()):
            answers = (side["target"], side["other"])
            side["difference"], at = position_effects(
                self.circuit, self.model, keys, side["ids"], answers, PAIR_TOKENS
            )
            for key, of_node in zip(keys, at.tolist(), strict=True):
                effects[key].append([round(effect, 4) for effect in of_node])
        return effects

    def _edge_effects(self, text: torch.Tensor) -> dict[tuple, float]:
        edges = self.circuit.split_edges(self.model)[0]
        edges = sorted(edges, key=lambda edge: abs(edge.weight), reverse=True)
        chosen = {edge.name for edge in edges[: self.config.edges]}
        attended = {}
        if any(name[0].endswith(".v") for name in chosen):
            attended = reference_means(self.model, text).attended
        return edge_effects(
            self.circuit,
            self.model,
            self.test,
            [edge for edge in edges if edge.name in chosen],
            attended,
            self._bar("cutting weights"),
        )

    def _activations(self, text: torch.Tensor) -> dict[str, Activations]:
        """On the task and its pairs with the circuit alone, on text with the whole model."""
        prompts = [list(ids) for ids in self.task.test[self.test_rows]["input_ids"]]
        sides = [side["ids"] for side in self._sides()]

        def recorded(what: str, sequences: list[list[int]], alone: bool) -> Activations:
            within = {"within": lambda: self.circuit.apply(self.model)} if alone else {}
            return record_activations(
                self.model, self.circuit.nodes, sequences, wrap=self._bar(what), **within
            )

        return {
            "task": recorded("activations on the task", prompts, True),
            "text": recorded("activations on text", text.tolist(), False),
            "pairs": recorded("activations on the pairs", sides, True),
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
            shown |= self._mate(site, index)
        for field, of_nodes in (("name", self.circuit.names), ("note", self.circuit.notes)):
            if text := of_nodes.get(node_text(key)):
                shown[field] = text
        if self.circuit.scores:
            shown["score"] = self.circuit.scores[site][index].item()
        column = self.circuit.nodes[site].index(index)
        samples = {name: activations[name] for name in ("task", "text")}
        columns = {name: a.values[site][:, column] for name, a in samples.items()}
        low = min(c.min().item() for c in columns.values())
        high = max(c.max().item() for c in columns.values())
        mean = self.circuit.means[site][index].item()
        count = self.config.examples
        return shown | {
            "effect": effects[key],
            "rank": order.index(key),
            "mean": mean,
            "low": low,
            "high": high,
            "histograms": {name: histogram(c, low, high) for name, c in columns.items()},
            "examples": {
                name: {
                    which: [self._example(name, recorded, example) for example in examples]
                    for which, examples in (
                        ("top", extreme_examples(recorded, site, column, mean, count, 1)),
                        ("bottom", extreme_examples(recorded, site, column, mean, count, -1)),
                        ("quantiles", quantile_examples(recorded, site, column)),
                    )
                }
                for name, recorded in samples.items()
            },
            "pairs": self._on_pairs(activations["pairs"], site, column),
        }

    def _mate(self, site: str, index: int) -> dict[str, Any]:
        """Site of the key that a query is multiplied with, or the other way round; and its mean,
        where it stands, if it is not in the circuit."""
        place, _, kind = site.rpartition(".")
        if kind not in ("q", "k"):
            return {}
        mate = f"{place}.{'k' if kind == 'q' else 'q'}"
        means = self.circuit.means[mate]
        if index in self.circuit.nodes.get(mate, ()) or index >= len(means):
            return {"mate": mate}
        return {"mate": mate, "mateMean": means[index].item()}

    def _on_pairs(self, recorded: Activations, site: str, column: int) -> list[list[float]]:
        """The node's activations at the last tokens of every side of every pair."""
        values = recorded.values[site][:, column]
        ends = zip(recorded.starts, recorded.starts[1:], strict=False)
        return [values[max(start, end - PAIR_TOKENS) : end].tolist() for start, end in ends]

    def _example(self, name: str, recorded: Activations, example: Example) -> list[Any]:
        numbers = self.sequences[name]
        number = numbers.setdefault(example.sequence, len(numbers))
        stop = example.start + len(example.values)
        self.token_ids.update(recorded.input_ids[example.sequence][example.start : stop])
        return [number, example.start, example.at, example.values]

    def _heads(self, graph: LayeredGraph) -> dict[str, Any]:
        """Patterns of every head with a node in the circuit, on both sides of every pair; and of
        others that bring one of its values, where several heads share keys and values."""
        heads = sorted(
            {
                (int(key[0].split(".")[1]), node.head)
                for key, node in graph.nodes.items()
                if node.head is not None
            }
        )
        bringing = {
            (int(link.source[0].split(".")[1]), link.head)
            for link in graph.links
            if link.head is not None
        }
        prompts = [side["ids"] for side in self._sides()]
        both = [*heads, *sorted(bringing - set(heads))]
        patterns = head_patterns(
            self.circuit, self.model, both, prompts, self._bar("where heads look")
        )
        scale = channel_scale(self.model, prompts[0], heads[0][0]) if heads else None
        return {"heads": patterns[: len(heads)], "others": patterns[len(heads) :], "scale": scale}

    def _curve(
        self, order: list[Key], circuit_loss: float, model_pairs: torch.Tensor
    ) -> dict[str, Any]:
        """Loss of the circuit's nodes, largest effect first, then of more; and of the model's best
        by score alone. What the circuit's loss is and what the whole model answers is known."""
        others = other_nodes(self.circuit)
        sizes = curve_sizes(len(order), len(order) + len(others))
        whole = binary_loss(model_pairs).item()
        known = {len(order) + len(others): whole}

        def losses(nodes: list[Key], at: list[int], known: dict[int, float], what: str):
            new = [size for size in at if size not in known]
            found = nested_losses(self.circuit, self.model, nodes, self._bar(what)(new), self.test)
            known = known | dict(zip(new, found, strict=True))
            return [known[size] for size in at]

        with_circuit = known | {len(order): circuit_loss}
        what = "smaller and larger circuits"
        curve = {
            "sizes": sizes,
            "losses": losses([*order, *others], sizes, with_circuit, what),
            "order": [list(key) for key in order],
        }
        if self.circuit.scores:
            ranked = by_score(self.circuit, [*order, *others])
            larger = [size for size in sizes if size >= len(order)]
            curve["byScore"] = losses(ranked, larger, known, "circuits by mask score alone")
            curve["byScoreSizes"] = larger
        return curve

    def _channels(self) -> list[dict[str, Any]]:
        channels = channel_embeddings(self.model, self.circuit.nodes)
        for entry in channels:
            for table in (entry.get("embed", {}), entry.get("unembed", {})):
                for end in ("positive", "negative"):
                    self.token_ids.update(token for token, _ in table.get(end, []))
        return channels
