"""A circuit for other programs: as a graph, a table, JSON, or a graph for Neuronpedia."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..tasks.binary_task import BinaryTask
from .ablation import in_eval_mode, recorded_sites, unwrapped
from .edges import Edge, embedding_edges, unembedding_edges
from .node_set import PARTS, NodeSet, node_text, site_order
from .program import write_program
from .task_scores import candidates

if TYPE_CHECKING:
    import networkx
    import pandas

NEURONPEDIA_SCHEMA = 1


class Exports(NodeSet):
    """What other programs take of a circuit."""

    def to_networkx(self, model: nn.Module) -> "networkx.MultiDiGraph":
        """A directed graph: a node per node, named as `h.0.mlp.post_act.7`, an edge per weight.

        Nodes have `site`, `index`, `name`, `note` and, where masks were learned, `score`; edges
        have `weight` and `gate` (whether it writes to the gate of a gated neuron).

        Raises:
            ValueError: the circuit was made for another model.
        """
        import networkx

        graph = networkx.MultiDiGraph(task=self.task, model=self.model_fingerprint)
        for row in self._rows():
            graph.add_node(row.pop("node"), **row)
        for edge in self.edges(model):
            source, target = _ends(edge)
            graph.add_edge(source, target, weight=edge.weight, gate=edge.gate)
        return graph

    def to_pandas(self, model: nn.Module | None = None) -> "pandas.DataFrame":
        """A table of the nodes, or, with a model, of the weights between them.

        Columns of nodes: `node`, `site`, `index`, `name`, `note`, `mean` and, where masks were
        learned, `score`; of weights: `source`, `target`, `weight`, `gate`.

        Raises:
            ValueError: the circuit was made for another model.
        """
        import pandas

        if model is None:
            return pandas.DataFrame(self._rows(), columns=self._columns())
        rows = [(*_ends(edge), edge.weight, edge.gate) for edge in self.edges(model)]
        return pandas.DataFrame(rows, columns=["source", "target", "weight", "gate"])

    def to_json(self, model: nn.Module | None = None) -> str:
        """The content of `circuit.json`; with a model also `edges`, each with its weight.

        Raises:
            ValueError: the circuit was made for another model.
        """
        content = self.to_dict()
        if model is not None:
            content["edges"] = [[*edge.name, edge.weight] for edge in self.edges(model)]
        return json.dumps(content, ensure_ascii=False, allow_nan=False)

    def to_program(
        self,
        path: str | os.PathLike,
        model: nn.Module,
        *,
        tokenizer: Any = None,
        task: BinaryTask | None = None,
        answers: Sequence[int] | None = None,
    ) -> Path:
        """Write the circuit as a Python program that needs numpy alone: a line per node and edge.

        `python circuit.py 5 17 301` prints the logits of the answers after these tokens, and its
        function `answers` returns them, as the model gives them inside [`Circuit.apply`]. What is
        no part of the reading, as embeddings, lies beside it in `circuit.npz`.

        Args:
            path: of the program, ending in `.py`.
            model: the one the circuit was cut out of, a CircuitGPT.
            tokenizer: the model's; then the answers are those of the circuit's task, with text.
            task: that one, where it is loaded already.
            answers: ids of other tokens to compare. Without them and without a tokenizer, those of
                the circuit's example.

        Returns:
            The program's path.

        Raises:
            ValueError: the circuit was made for another model, that is no CircuitGPT, the path
                does not end in `.py`, or no answers are known.
        """
        if answers is None and tokenizer is not None:
            task = task or self.load_task(tokenizer)
            both = [candidates(task.tensors(split)) for split in ("train", "test")]
            answers = torch.cat(both).unique().tolist()
        elif answers is None:
            ends = ("target_id", "counterfactual_target_id")
            answers = [self.example[end] for end in ends if end in self.example]
        if not answers:
            raise ValueError("The circuit has no example; pass answers, the ids of tokens.")
        texts = {i: f"token {i}" if tokenizer is None else tokenizer.decode([i]) for i in answers}
        return write_program(self, path, model, texts)

    def to_neuronpedia(
        self, model: nn.Module, tokenizer: Any, *, slug: str | None = None
    ) -> dict[str, Any]:
        """The circuit on its example prompt, in the graph schema that Neuronpedia and
        circuit-tracer read; write it with `json.dump`.

        A node of the circuit is one node of the graph, at the token where it is farthest from its
        mean, with its activation there; its label is its name. Links are weights (theirs are
        attributions). Layers of the graph count attention and MLP apart.

        Args:
            model: the one the circuit was cut out of.
            tokenizer: the model's.
            slug: the graph's name; the task's if not given.

        Raises:
            ValueError: the circuit was made for another model, or has no example.
        """
        tokens = self.example.get("token_ids")
        answers = [self.example.get(n) for n in ("target_id", "counterfactual_target_id")]
        if not tokens or None in answers:
            raise ValueError("The circuit has no example prompt, so that there is nothing to show.")
        at, activations, logits = self._on_example(model, tokens)
        inner, last = unwrapped(model), len(tokens) - 1
        pieces = [tokenizer.decode([token]) for token in tokens]
        end = str(2 * inner.config.num_hidden_layers)
        nodes, ids = [], {}
        for position, token in enumerate(tokens):
            ids["token", token, position] = f"E_{token}_{position}"
            nodes.append(_graph_node(
                ids["token", token, position], "E", position, token, "embedding",
                repr(pieces[position]), last,
            ))  # fmt: skip
        for site, index in self:
            layer, feature = _graph_place(site, index)
            position = at[site, index]
            ids[site, index] = f"{layer}_{feature}_{position}"
            label = self.names.get(node_text((site, index)), node_text((site, index)))
            node = _graph_node(
                ids[site, index], layer, position, feature, "circuit node", label, last
            )
            nodes.append({**node, "activation": activations[site, index]})
        probabilities = logits.softmax(-1)
        for token in answers:
            ids["answer", token] = f"{end}_{token}_{last}"
            label = f"Output {tokenizer.decode([token])!r} (p={probabilities[token]:.3f})"
            node = _graph_node(ids["answer", token], end, last, token, "logit", label, last)
            shown = {"token_prob": probabilities[token].item()}
            nodes.append({**node, **shown, "is_target_logit": token == answers[0]})
        return {
            "metadata": {
                "slug": slug or self.task,
                "scan": self.model_name or self.model_fingerprint,
                "transcoder_list": [],
                "prompt_tokens": pieces,
                "prompt": tokenizer.decode(tokens),
                "node_threshold": None,
                "schema_version": NEURONPEDIA_SCHEMA,
            },
            "qParams": {
                "pinnedIds": [ids[node] for node in self],
                "supernodes": [],
                "linkType": "both",
                "clickedId": "",
                "sg_pos": "",
            },
            "nodes": nodes,
            "links": [
                {"source": ids[source], "target": ids[target], "weight": weight}
                for source, target, weight in self._graph_links(model, tokens, answers)
            ],
        }

    def _graph_links(
        self, model: nn.Module, tokens: list[int], answers: list[int]
    ) -> list[tuple[tuple, tuple, float]]:
        inner = unwrapped(model)
        links: list[tuple[tuple, tuple, float]] = [
            ((e.source_site, e.source), (e.target_site, e.target), e.weight)
            for e in self.edges(model)
        ]
        reads = [(site, i) for site, i in self if site.endswith("act_in")]
        writes = [(site, i) for site, i in self if site.endswith("resid_delta")]
        for token, channel, weight in embedding_edges(inner, self.nodes, tokens):
            links += [
                (("token", token, position), node, weight)
                for position, there in enumerate(tokens)
                for node in reads
                if there == token and node[1] == channel
            ]
        for channel, token, weight in unembedding_edges(inner, self.nodes, answers):
            links += [(node, ("answer", token), weight) for node in writes if node[1] == channel]
        # What one part of the model writes to a channel, a later one reads.
        links += [
            (source, target, 1.0)
            for source in writes
            for target in reads
            if source[1] == target[1] and site_order(source[0]) < site_order(target[0])
        ]
        return links

    @torch.no_grad()
    def _on_example(
        self, model: nn.Module, tokens: list[int]
    ) -> tuple[dict[tuple, int], dict[tuple, float], torch.Tensor]:
        """Where each node is farthest from its mean, what it is there, and the last logits, while
        the circuit runs alone."""
        inner = unwrapped(model)
        ids = torch.tensor([tokens], device=next(inner.parameters()).device)
        with (
            in_eval_mode(inner), self.apply(model), recorded_sites(inner, self.nodes) as recorded
        ):  # fmt: skip
            logits = inner(input_ids=ids, use_cache=False).logits[0, -1].float().cpu()
        at, activations = {}, {}
        for site, index in self:
            values = recorded[site][0, :, index].float().cpu()
            position = int((values - self.means[site][index]).abs().argmax())
            at[site, index], activations[site, index] = position, values[position].item()
        return at, activations, logits

    def _columns(self) -> list[str]:
        columns = ["node", "site", "index", "name", "note", "mean"]
        return [*columns, "score"] if self.scores else columns

    def _rows(self) -> list[dict[str, Any]]:
        rows = []
        for site, index in self:
            node = node_text((site, index))
            row: dict[str, Any] = {
                "node": node, "site": site, "index": index,
                "name": self.names.get(node, ""), "note": self.notes.get(node, ""),
                "mean": self.means[site][index].item(),
            }  # fmt: skip
            if self.scores:
                row["score"] = self.scores[site][index].item()
            rows.append(row)
        return rows


def _ends(edge: Edge) -> tuple[str, str]:
    return node_text((edge.source_site, edge.source)), node_text((edge.target_site, edge.target))


def _graph_place(site: str, index: int) -> tuple[str, int]:
    """Layer and feature number of a node, by which nodes of a graph differ."""
    _, layer, part = site.split(".", 2)
    return str(2 * int(layer) + part.startswith("mlp.")), len(PARTS) * index + PARTS.index(part)


def _graph_node(
    name: str, layer: str, position: int, feature: int, kind: str, label: str, last: int
) -> dict[str, Any]:
    return {
        "node_id": name, "feature": feature, "layer": layer, "ctx_idx": position,
        "feature_type": kind, "token_prob": 0.0, "is_target_logit": False, "run_idx": 0,
        "reverse_ctx_idx": last - position, "jsNodeId": name, "clerp": label,
        "influence": None, "activation": None,
    }  # fmt: skip
