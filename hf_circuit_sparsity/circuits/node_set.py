"""What can be done with a circuit's nodes as a set."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, TypeVar

import torch

Node = tuple[str, int]
"""Site and index there."""


def as_node(node: Node | str) -> Node:
    """A node, also where it is written as `h.0.mlp.post_act.7`.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(node, str):
        site, _, index = node.rpartition(".")
        if site and index.isdecimal():
            return site, int(index)
    elif len(node) == 2 and isinstance(node[0], str) and isinstance(node[1], int):
        return node[0], node[1]
    raise ValueError(
        f"{node!r} was passed, expected a node as ('h.0.mlp.post_act', 7) or 'h.0.mlp.post_act.7'."
    )


PARTS = (
    "attn.act_in", "attn.q", "attn.k", "attn.v", "attn.resid_delta", "mlp.act_in", "mlp.post_act",
    "mlp.resid_delta",
)  # fmt: skip
"""Sites of a layer, in the order of computation."""


def site_order(site: str) -> tuple[int, int]:
    """By which sites come in the order of computation; those with other names come last."""
    _, layer, part = [*site.split(".", 2), "", ""][:3]
    return (int(layer), PARTS.index(part)) if layer.isdecimal() and part in PARTS else (2**31, 0)


def node_text(node: Node) -> str:
    """A node as one word."""
    return f"{node[0]}.{node[1]}"


Nodes = TypeVar("Nodes", bound="NodeSet")


class NodeSet:
    """The nodes of a circuit, which are its `nodes`, as a set.

    What makes another circuit of one drops what no longer holds: metrics, verification, and which
    weights were pruned, so that all weights between the nodes are in it again. Names and notes of
    nodes stay. Of two circuits the first gives means, task and calibration.
    """

    task: str
    nodes: dict[str, list[int]]
    kept_edges: list[tuple[str, int, str, int]] | None
    metrics: dict[str, float]
    verification: dict[str, dict[str, float]]
    config: dict[str, Any]
    names: dict[str, str]
    notes: dict[str, str]
    tokens: list[int] | None
    token_mean: torch.Tensor | None
    model_fingerprint: str

    def __len__(self) -> int:
        return sum(len(ids) for ids in self.nodes.values())

    def __iter__(self) -> Iterator[Node]:
        """Nodes, `(site, index)`, in the order of computation."""
        return ((site, i) for site in sorted(self.nodes, key=site_order) for i in self.nodes[site])

    def __contains__(self, node: object) -> bool:
        try:
            site, index = as_node(node)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            return False
        return index in self.nodes.get(site, ())

    def __or__(self: Nodes, other: "NodeSet") -> Nodes:
        return self._combined(other, set.union)

    def __and__(self: Nodes, other: "NodeSet") -> Nodes:
        return self._combined(other, set.intersection)

    def __sub__(self: Nodes, other: "NodeSet") -> Nodes:
        return self._combined(other, set.difference)

    def jaccard(self, other: "NodeSet") -> float:
        """Share of the nodes of either circuit that both have; 1 for two empty ones."""
        mine, theirs = set(self), set(other)
        return len(mine & theirs) / len(mine | theirs) if mine | theirs else 1.0

    def without(self: Nodes, *nodes: Node | str) -> Nodes:
        """The circuit without these nodes.

        Raises:
            ValueError: one of them is not in the circuit.
        """
        gone = {as_node(node) for node in nodes}
        if missing := sorted(gone - set(self)):
            raise ValueError(f"{node_text(missing[0])} was to go, but it is not in the circuit.")
        return self._with(set(self) - gone)

    def with_nodes(self: Nodes, *nodes: Node | str) -> Nodes:
        """The circuit with these nodes as well.

        Raises:
            ValueError: the model has no such node.
        """
        return self._with(set(self) | {as_node(node) for node in nodes})

    def label(self, node: Node | str, name: str, note: str = "") -> None:
        """Give a node a name of a few words, and a note; empty ones are taken away.

        Raises:
            ValueError: it is not in the circuit.
        """
        text = node_text(as_node(node))
        if text not in self:
            raise ValueError(f"{text} was to be named, but it is not in the circuit.")
        for field, value in (("names", name), ("notes", note)):
            called = {n: t for n, t in getattr(self, field).items() if n != text}
            setattr(self, field, called | ({text: value} if value else {}))

    def _combined(self: Nodes, other: "NodeSet", of_sets: Callable[[set, set], set]) -> Nodes:
        if not isinstance(other, NodeSet):
            return NotImplemented
        if self.model_fingerprint != other.model_fingerprint:
            raise ValueError(
                f"The circuits are of two models, {self.model_fingerprint} and "
                f"{other.model_fingerprint}; combine circuits of one."
            )
        both = {f: getattr(other, f) | getattr(self, f) for f in ("names", "notes")}
        tokens = self._combined_tokens(other, of_sets)
        mean = self.token_mean if self.tokens is not None else other.token_mean
        both["token_mean"] = None if tokens is None else mean
        return self._with(of_sets(set(self), set(other)), tokens=tokens, **both)

    def _combined_tokens(
        self, other: "NodeSet", of_sets: Callable[[set, set], set]
    ) -> list[int] | None:
        """A circuit that names no tokens has all of them. Differences are of nodes alone."""
        if of_sets is set.difference:
            return self.tokens
        named = [set(c.tokens) for c in (self, other) if c.tokens is not None]
        if not named or (of_sets is set.union and len(named) < 2):
            return None
        return sorted(of_sets(*named) if len(named) == 2 else named[0])

    def _with(self: Nodes, nodes: Iterable[Node], **fields: Any) -> Nodes:
        kept = set(nodes)
        of_site: dict[str, list[int]] = {}
        for site, index in sorted(kept, key=lambda node: site_order(node[0])):
            of_site.setdefault(site, []).append(index)
        named = {node_text(node) for node in kept}
        fields = {"names": self.names, "notes": self.notes, **fields}
        for field in ("names", "notes"):
            fields[field] = {n: text for n, text in fields[field].items() if n in named}
        # The seed says which prompts the task has.
        config = {name: value for name, value in self.config.items() if name == "seed"}
        dropped = {"kept_edges": None, "edge_offsets": {}, "metrics": {}, "verification": {}}
        return replace(self, nodes=of_site, config=config, **dropped, **fields)
