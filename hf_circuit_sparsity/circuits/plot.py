"""A circuit as a layered graph that a person can read: computation runs from left to right."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from .ablation import node_sites
from .edges import embedding_edges, unembedding_edges

if TYPE_CHECKING:
    from .circuit import Circuit

POSITIVE, NEGATIVE, RESIDUAL = "#c0392b", "#2e6da4", "#b8b8b8"
SITE_COLOURS = {
    "act_in": "#f3efe0",
    "q": "#fbe3c8",
    "k": "#d9ead3",
    "v": "#e5d9f2",
    "resid_delta": "#dfe7ef",
    "post_act": "#fff2b3",
    "token": "#ffffff",
}
SITE_WORDS = {
    "attn.act_in": "reads",
    "attn.q": "query",
    "attn.k": "key",
    "attn.v": "value",
    "attn.resid_delta": "writes",
    "mlp.act_in": "reads",
    "mlp.post_act": "neuron",
    "mlp.resid_delta": "writes",
}
MAX_LABELLED_EDGES = 60
MAX_TOKENS = 14


class _Node(NamedTuple):
    column: int
    key: tuple
    label: str
    kind: str


def plot_circuit(
    circuit: "Circuit", path: str | os.PathLike, model: nn.Module, tokenizer: Any = None
) -> Path:
    """Draw `circuit` into a picture file; see [`Circuit.plot`]."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "Drawing a circuit needs matplotlib; pip install 'hf-circuit-sparsity[viz]'."
        ) from error
    path = Path(path)
    nodes, columns = _layout_nodes(circuit, model, tokenizer)
    links = _links(circuit, model)
    links = [link for link in links if link[0] in nodes and link[1] in nodes]
    linked = {end for link in links for end in link[:2]}
    # A token that nothing in the circuit reads says nothing.
    nodes = {k: n for k, n in nodes.items() if n.kind != "token" or k in linked}
    position = _positions(nodes, links)

    tallest = max(1, *(sum(n.column == c for n in nodes.values()) for c in range(len(columns))))
    # Inches: a row of nodes, and what stands above and below them.
    row, above, below = 0.55, 1.15, 0.75
    height = row * tallest + above + below
    figure = Figure(figsize=(max(7.5, 1.55 * len(columns)), height))
    axes = figure.add_axes((0.02, below / height, 0.96, row * tallest / height))
    axes.axis("off")
    _draw_links(axes, links, position)
    _draw_nodes(axes, nodes, position)
    half = tallest / 2
    for column, title in enumerate(columns):
        axes.text(column, half + 0.05, title, ha="center", va="bottom", fontsize=8, color="#444")
    axes.set_xlim(-0.6, len(columns) - 0.4)
    axes.set_ylim(-half, half)
    _draw_captions(figure, circuit, sum(kind == "weight" for *_, kind in links))

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    figure.savefig(temporary, dpi=160, facecolor="white")
    os.replace(temporary, path)
    return path


def _token_label(tokenizer: Any, token: int) -> str:
    if tokenizer is None:
        return f"#{token}"
    text = repr(tokenizer.decode([token]))[1:-1]
    return (text if len(text) <= 14 else text[:13] + "…").replace("$", r"\$").replace(" ", "␣")


def _layout_nodes(
    circuit: "Circuit", model: nn.Module, tokenizer: Any
) -> tuple[dict[tuple, _Node], list[str]]:
    """All nodes of the picture by key, each with its column, and the columns' titles."""
    groups: list[tuple[str, list[str]]] = []  # a title and the sites that share its column
    for site in node_sites(model):  # in the order of computation
        if site not in circuit.nodes:
            continue
        _, layer, part = site.split(".", 2)
        block = part.split(".")[0]
        title = f"layer {layer}\n{block}"
        if part in ("attn.q", "attn.k", "attn.v"):
            title += "\nq · k · v"
            if groups and groups[-1][0] == title:
                groups[-1][1].append(site)
                continue
        else:
            title += f"\n{SITE_WORDS[part]}"
        groups.append((title, [site]))

    nodes: dict[tuple, _Node] = {}
    head_width = getattr(getattr(model, "config", None), "head_dim", None)
    for column, (_, sites) in enumerate(groups, start=1):
        for site in sites:
            kind = site.rsplit(".", 1)[1]
            for index in circuit.nodes[site]:
                label = str(index)
                if kind in "qkv" and head_width:
                    label = f"{kind} {index}\nhead {index // head_width}"
                nodes[(site, index)] = _Node(column, (site, index), label, kind)

    strengths: dict[int, float] = {}
    for token, _, weight in embedding_edges(model, circuit.nodes, _deciding_tokens(circuit)):
        strengths[token] = max(strengths.get(token, 0.0), abs(weight))
    for token in sorted(strengths, key=strengths.__getitem__, reverse=True)[:MAX_TOKENS]:
        key = ("token", token)
        nodes[key] = _Node(0, key, _token_label(tokenizer, token), "token")
    last = len(groups) + 1
    for token in _answers(circuit):
        key = ("answer", token)
        nodes[key] = _Node(last, key, _token_label(tokenizer, token), "token")
    return nodes, ["tokens that\ndecide", *(title for title, _ in groups), "answers"]


def _deciding_tokens(circuit: "Circuit") -> list[int]:
    """Tokens in which the example and its counterfactual differ; all tokens if none do."""
    here = circuit.example.get("token_ids", [])
    there = circuit.example.get("counterfactual_token_ids", [])
    return sorted(set(here) ^ set(there)) or sorted(set(here) | set(there))


def _answers(circuit: "Circuit") -> list[int]:
    example = circuit.example
    names = ("target_id", "counterfactual_target_id")
    return [example[name] for name in names if name in example]


def _links(circuit: "Circuit", model: nn.Module) -> list[tuple[tuple, tuple, float, str]]:
    """Source, target, weight and kind (`weight`, `embed`, `residual`) of every line."""
    links = [
        ((e.source_site, e.source), (e.target_site, e.target), e.weight, "weight")
        for e in circuit.edges(model)
    ]
    order = list(node_sites(model))
    readers = [(s, i) for s, ids in circuit.nodes.items() if s.endswith("act_in") for i in ids]
    writers = [(s, i) for s, ids in circuit.nodes.items() if s.endswith("resid_delta") for i in ids]
    for writer in writers:
        for reader in readers:
            if reader[1] == writer[1] and order.index(reader[0]) > order.index(writer[0]):
                links.append((writer, reader, 0.0, "residual"))
    for token, channel, weight in embedding_edges(model, circuit.nodes, _deciding_tokens(circuit)):
        links += [(("token", token), r, weight, "embed") for r in readers if r[1] == channel]
    for channel, token, weight in unembedding_edges(model, circuit.nodes, _answers(circuit)):
        links += [(w, ("answer", token), weight, "embed") for w in writers if w[1] == channel]
    return links


def _positions(
    nodes: dict[tuple, _Node], links: list[tuple[tuple, tuple, float, str]]
) -> dict[tuple, tuple[float, float]]:
    """Columns from left to right; within one, sorted to keep lines short (barycentre sweeps)."""
    columns: dict[int, list[tuple]] = {}
    for key, node in nodes.items():
        columns.setdefault(node.column, []).append(key)
    neighbours: dict[tuple, list[tuple]] = {key: [] for key in nodes}
    for source, target, *_ in links:
        if source in nodes and target in nodes:
            neighbours[source].append(target)
            neighbours[target].append(source)
    y: dict[tuple, float] = {}
    for keys in columns.values():
        for row, key in enumerate(keys):
            y[key] = (len(keys) - 1) / 2 - row
    for sweep in range(8):
        for column in sorted(columns, reverse=bool(sweep % 2)):
            keys = columns[column]

            def centre(key: tuple) -> float:
                around = [y[n] for n in neighbours[key]]
                return sum(around) / len(around) if around else y[key]

            for row, key in enumerate(sorted(keys, key=centre, reverse=True)):
                y[key] = (len(keys) - 1) / 2 - row
    return {key: (float(node.column), y[key]) for key, node in nodes.items()}


def _draw_links(axes: Any, links: list, position: dict) -> None:
    strongest = max((abs(w) for *_, w, kind in links if kind != "residual"), default=1.0) or 1.0
    labelled = sum(kind != "residual" for *_, kind in links) <= MAX_LABELLED_EDGES
    labels: list[tuple[float, float]] = []
    for source, target, weight, kind in links:
        (x0, y0), (x1, y1) = position[source], position[target]
        if kind == "residual":
            axes.plot([x0, x1], [y0, y1], ":", color=RESIDUAL, linewidth=1.1, zorder=1)
            continue
        colour = POSITIVE if weight > 0 else NEGATIVE
        width = 0.5 + 2.6 * abs(weight) / strongest
        style = "-" if kind == "weight" else (0, (4, 1.5))
        axes.plot(
            [x0, x1], [y0, y1], color=colour, linewidth=width, linestyle=style, alpha=0.8, zorder=2
        )
        if labelled:
            # Where on its line a label is farthest from those already there; a column is about
            # three rows wide, and labels are wider than high.
            places = [(x0 + t * (x1 - x0), y0 + t * (y1 - y0)) for t in (0.5, 0.4, 0.6, 0.3, 0.7)]
            x, y = max(
                places,
                key=lambda p: min(
                    ((1.5 * (p[0] - q[0])) ** 2 + (p[1] - q[1]) ** 2 for q in labels), default=0.0
                ),
            )
            labels.append((x, y))
            axes.text(
                x, y, f"{weight:+.2f}", fontsize=5.5, color=colour, ha="center", va="center",
                zorder=4,
                bbox={"boxstyle": "round,pad=0.1", "facecolor": "white", "edgecolor": "none"},
            )  # fmt: skip


def _draw_nodes(axes: Any, nodes: dict[tuple, _Node], position: dict) -> None:
    for key, node in nodes.items():
        shape = "round,pad=0.35" if node.kind == "token" else "round4,pad=0.35"
        axes.text(
            *position[key], node.label, ha="center", va="center", fontsize=7, zorder=5,
            family="monospace" if node.kind == "token" else None,
            bbox={
                "boxstyle": shape, "facecolor": SITE_COLOURS[node.kind], "edgecolor": "#666",
                "linewidth": 0.7,
            },
        )  # fmt: skip


def _draw_captions(figure: Any, circuit: "Circuit", edges: int) -> None:
    metrics = circuit.metrics
    facts = [f"{len(circuit)} nodes", f"{edges} edges"]
    if "circuit_loss" in metrics:
        facts.append(f"loss {metrics['circuit_loss']:.3f} alone")
        facts.append(f"{metrics['ablated_loss']:.3f} without it")
        facts.append(f"{metrics['model_loss']:.3f} whole model")
    title = f"{circuit.task}: {', '.join(facts)}"
    figure.text(0.5, 0.985, title, ha="center", va="top", fontsize=10)
    lines = []
    if circuit.example:
        prompt = repr(circuit.example["prompt"]).replace("$", r"\$")
        prompt = prompt if len(prompt) <= 110 else "…" + prompt[-109:]
        answer = repr(circuit.example["target"]).replace("$", r"\$")
        other = repr(circuit.example["counterfactual_target"]).replace("$", r"\$")
        lines.append(f"{prompt}  →  {answer}, not {other}")
    lines.append(
        "red: positive weight, blue: negative; dashed: embedding and unembedding; "
        "dotted: the same residual channel"
    )
    figure.text(0.5, 0.015, "\n".join(lines), ha="center", va="bottom", fontsize=7.5, color="#333")
