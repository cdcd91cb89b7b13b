"""A circuit as a layered graph: what is drawn in which column and row, for pictures and pages.

Computation runs from left to right: tokens, then every site of the model that has nodes in the
circuit, then the answers. Queries, keys and values of a layer share a column, head by head.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from torch import nn

from ...decoders.decoder import decoder_of
from ..ablation import node_sites, unwrapped
from ..circuit import Circuit
from ..edges import Edge, embedding_edges, unembedding_edges

Key = tuple[str, int]
"""A node's site, or `token` / `answer`, and its index there, or the token's id."""

ROLES = {
    "act_in": "reads",
    "q": "qkv",
    "k": "qkv",
    "v": "qkv",
    "post_act": "neurons",
    "resid_delta": "writes",
}
"""Last part of a site's name → the role of its column; the graph's ends are tokens and answers."""
MAX_TOKENS = 14
HEAD_GAP = 0.9
"""Rows left free between two heads of a column."""
CLEAR = 0.5
"""Rows from a box's middle to where a line passes it."""
HEAD_CLEAR = 1.15
"""The same above the first box of a head, where the head's title is."""


class Column(NamedTuple):
    """What stands above a column; layer and block are empty at the graph's two ends."""

    layer: str
    block: str
    role: str


class GraphNode(NamedTuple):
    """One box of the graph."""

    column: int
    key: Key
    kind: str
    """`token`, or the last part of the site: `act_in`, `q`, `k`, `v`, `post_act`, …"""
    head: int | None
    """Of queries, keys and values."""


class GraphLink(NamedTuple):
    """One line of the graph."""

    source: Key
    target: Key
    weight: float
    kind: str
    """`weight`, `embed` (embedding or unembedding), or `residual`: the target reads the channel
    that the source writes, and the weight is 0."""
    via: tuple[float, ...] = ()
    """Rows at which it passes the columns between its ends, clear of their boxes."""
    head: int | None = None
    """Of a weight that reads a value: the head that brings it, by its queries."""


class LayeredGraph(NamedTuple):
    """A circuit's nodes and lines, laid out."""

    columns: list[Column]
    nodes: dict[Key, GraphNode]
    links: list[GraphLink]
    rows: dict[Key, float]
    """Vertical place of every node in rows, upwards, 0 in the middle of the column."""
    cut_edges: int
    """Weights between the nodes that were pruned, and so are not among the links."""


def layered_graph(circuit: Circuit, model: nn.Module) -> LayeredGraph:
    """Lay `circuit` out with the edges that `model`'s weights give it.

    Raises:
        ValueError: the circuit was made for another model.
    """
    circuit.check_model(model)
    model = unwrapped(model)
    edges, cut = circuit.split_edges(model)
    embedded = embedding_edges(model, circuit.nodes, deciding_tokens(circuit))
    unembedded = unembedding_edges(model, circuit.nodes, answer_tokens(circuit))
    strengths: dict[int, float] = {}
    for token, _, weight in embedded:
        strengths[token] = max(strengths.get(token, 0.0), abs(weight))
    # A token that nothing in the circuit reads says nothing.
    tokens = sorted(strengths, key=strengths.__getitem__, reverse=True)[:MAX_TOKENS]
    columns, nodes = _columns(circuit, model, tokens)
    links = _links(
        circuit, list(node_sites(model)), edges, embedded, unembedded, decoder_of(model).head_dim
    )
    links = [link for link in links if link.source in nodes and link.target in nodes]
    rows = _rows(nodes, links)
    return LayeredGraph(columns, nodes, _routed(nodes, links, rows), rows, len(cut))


def deciding_tokens(circuit: Circuit) -> list[int]:
    """Tokens in which the example and its counterfactual differ; all tokens if none do.

    Where tokens were pruned, only those that are kept.
    """
    prompt = set(circuit.example.get("token_ids", []))
    counterfactual = set(circuit.example.get("counterfactual_token_ids", []))
    deciding = (prompt ^ counterfactual) or (prompt | counterfactual)
    return sorted(deciding if circuit.tokens is None else deciding & set(circuit.tokens))


def answer_tokens(circuit: Circuit) -> list[int]:
    """The example's right answer and its counterfactual's, as far as the circuit names them."""
    names = ("target_id", "counterfactual_target_id")
    return [circuit.example[name] for name in names if name in circuit.example]


def _columns(
    circuit: Circuit, model: nn.Module, tokens: Sequence[int]
) -> tuple[list[Column], dict[Key, GraphNode]]:
    columns = [Column("", "", "tokens")]
    nodes = {("token", token): GraphNode(0, ("token", token), "token", None) for token in tokens}
    head_width = getattr(getattr(model, "config", None), "head_dim", None)
    for site in node_sites(model):  # in the order of computation
        if site not in circuit.nodes:
            continue
        _, layer, block, kind = site.split(".")
        column = Column(layer, block, ROLES[kind])
        if column != columns[-1]:
            columns.append(column)
        for index in circuit.nodes[site]:
            head = index // head_width if column.role == "qkv" and head_width else None
            nodes[site, index] = GraphNode(len(columns) - 1, (site, index), kind, head)
    for token in answer_tokens(circuit):
        nodes["answer", token] = GraphNode(len(columns), ("answer", token), "token", None)
    return [*columns, Column("", "", "answers")], nodes


def _links(
    circuit: Circuit,
    sites: Sequence[str],
    edges: Iterable[Edge],
    embedded: Iterable[tuple[int, int, float]],
    unembedded: Iterable[tuple[int, int, float]],
    head_dim: int,
) -> list[GraphLink]:
    links = [
        GraphLink(
            (e.source_site, e.source), (e.target_site, e.target), e.weight, "weight",
            head=e.column // head_dim if e.source_site.endswith(".v") else None,
        )
        for e in edges
    ]  # fmt: skip
    readers = [(s, i) for s, ids in circuit.nodes.items() if s.endswith("act_in") for i in ids]
    writers = [(s, i) for s, ids in circuit.nodes.items() if s.endswith("resid_delta") for i in ids]
    for writer in writers:
        for reader in readers:
            if reader[1] == writer[1] and sites.index(reader[0]) > sites.index(writer[0]):
                links.append(GraphLink(writer, reader, 0.0, "residual"))
    for token, channel, weight in embedded:
        source = ("token", token)
        links += [GraphLink(source, r, weight, "embed") for r in readers if r[1] == channel]
    for channel, token, weight in unembedded:
        target = ("answer", token)
        links += [GraphLink(w, target, weight, "embed") for w in writers if w[1] == channel]
    return links


def _rows(nodes: dict[Key, GraphNode], links: list[GraphLink]) -> dict[Key, float]:
    """Rows that keep lines short: barycentre sweeps over the columns, heads kept together."""
    columns: dict[int, list[Key]] = {}
    neighbours: dict[Key, list[Key]] = {key: [] for key in nodes}
    for key, node in nodes.items():
        columns.setdefault(node.column, []).append(key)
    for link in links:
        neighbours[link.source].append(link.target)
        neighbours[link.target].append(link.source)
    rows: dict[Key, float] = {}

    def centre(key: Key) -> float:
        around = [rows[n] for n in neighbours[key]]
        return sum(around) / len(around) if around else rows[key]

    def arrange(keys: list[Key], by: Callable[[Key], float]) -> None:
        heads: dict[int | None, list[Key]] = {}
        for key in sorted(keys, key=by, reverse=True):
            heads.setdefault(nodes[key].head, []).append(key)
        groups = sorted(
            heads.values(), key=lambda keys: sum(map(by, keys)) / len(keys), reverse=True
        )
        row = (len(keys) - 1 + HEAD_GAP * (len(groups) - 1)) / 2
        for group in groups:
            for key in group:
                rows[key] = row
                row -= 1
            row -= HEAD_GAP

    for keys in columns.values():
        order = {key: float(-i) for i, key in enumerate(keys)}
        arrange(keys, order.__getitem__)
    for sweep in range(8):
        for column in sorted(columns, reverse=bool(sweep % 2)):
            # Measured before any of them moves: a column has no lines of its own.
            centres = {key: centre(key) for key in columns[column]}
            arrange(columns[column], centres.__getitem__)
    return rows


def _routed(
    nodes: dict[Key, GraphNode], links: list[GraphLink], rows: dict[Key, float]
) -> list[GraphLink]:
    """The links with the rows at which they pass the columns between, so that none is hidden."""
    columns: dict[int, list[Key]] = {}
    for key, node in nodes.items():
        columns.setdefault(node.column, []).append(key)
    gaps = {column: _gaps(keys, nodes, rows) for column, keys in columns.items()}
    routes = []
    shared: dict[tuple[int, float], list[tuple[int, int]]] = {}
    for number, link in enumerate(links):
        first, last = nodes[link.source].column, nodes[link.target].column
        row, end, via = rows[link.source], rows[link.target], []
        for column in range(first + 1, last):
            row += (end - row) / (last - column + 1)
            low, high, between = gaps.get(column, (0.0, 0.0, []))
            if column in gaps and low < row < high:
                row = min([low, *between, high], key=lambda gap: abs(gap - row))
                shared.setdefault((column, row), []).append((number, len(via)))
            via.append(row)
        routes.append(via)
    # Lines that pass through one gap lie beside each other.
    for (_, gap), places in shared.items():
        step = min(0.08, 0.24 / len(places))
        for i, (number, place) in enumerate(places):
            routes[number][place] = gap + step * (i - (len(places) - 1) / 2)
    return [link._replace(via=tuple(via)) for link, via in zip(links, routes, strict=True)]


def _gaps(
    keys: list[Key], nodes: dict[Key, GraphNode], rows: dict[Key, float]
) -> tuple[float, float, list[float]]:
    """Below and above which a column is free, and the rows between that are."""
    places = sorted(keys, key=rows.__getitem__, reverse=True)
    top = rows[places[0]] + (CLEAR if nodes[places[0]].head is None else HEAD_CLEAR)
    below = [rows[key] - CLEAR for key in places]
    return below[-1], top, below[:-1]
