"""A circuit as a picture for a paper or a card: a layered graph that fits a column of print."""

import os
import textwrap
from pathlib import Path
from typing import Any, Literal

from torch import nn

from ...files import save_figure
from ..circuit import Circuit
from ..node_set import node_text
from .layout import Column, GraphLink, GraphNode, Key, LayeredGraph, layered_graph

PaperColumn = Literal["single", "double"]
WIDTHS = {"single": 3.25, "double": 6.75}
"""Inches, of one column and of the whole width of a two-column page."""
MAX_HEIGHT = 8.5
"""Inches, of the space for nodes; what does not fit in is drawn closer together."""

# Told apart by every kind of colour vision (Okabe and Ito).
POSITIVE, NEGATIVE, RESIDUAL = "#c65300", "#0067a5", "#9a9a9a"
SITE_COLOURS = {
    "act_in": "#f4efdf",
    "q": "#fbe3c8",
    "k": "#d7ebd8",
    "v": "#e6daf3",
    "resid_delta": "#dce8f3",
    "post_act": "#fdf0b0",
    "token": "#ffffff",
}
FONT = {"title": 7.5, "text": 6.5, "small": 5.5}
MAX_LABELLED_EDGES = 60


def plot_circuit(
    circuit: Circuit,
    path: str | os.PathLike,
    model: nn.Module,
    tokenizer: Any = None,
    column: PaperColumn = "double",
) -> Path:
    """Draw a circuit as a layered graph into a PNG, SVG or PDF file (needs matplotlib).

    Args:
        circuit: of `model`.
        path: where to; its ending says the format.
        model: the model the circuit was cut out of; its weights are the edges.
        tokenizer: names the tokens at both ends, if given.
        column: fits one column of a two-column page (3.25 inches) or both (6.75 inches).

    Returns:
        The path.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the circuit was made for another model, or an unknown `column`.
    """
    if column not in WIDTHS:
        raise ValueError(f'column={column!r} was passed, but it must be "single" or "double".')
    graph = layered_graph(circuit, model)
    return save_figure(
        path, lambda figure: _draw(figure, circuit, graph, tokenizer, WIDTHS[column])
    )


def token_text(tokenizer: Any, token: int, longest: int = 14) -> str:
    """A token as a short visible label: escapes for control characters, `␣` for spaces."""
    if tokenizer is None:
        return f"#{token}"
    text = repr(tokenizer.decode([token]))[1:-1].replace(" ", "␣")
    return text if len(text) <= longest else text[: longest - 1] + "…"


def _draw(
    figure_class: Any, circuit: Circuit, graph: LayeredGraph, tokenizer: Any, width: float
) -> Any:
    pitch = (width - 0.1) / len(graph.columns)  # inches from one column to the next
    tallest = max([1.0, *(2 * abs(row) + 1 for row in graph.rows.values())])
    row = min(0.34 if pitch > 0.9 else 0.27, MAX_HEIGHT / tallest)
    font = min(FONT["text"], 72 * row * 0.5)
    title = _wrapped(_facts(circuit, graph), width, FONT["title"])
    caption = "\n".join(_wrapped(text, width, FONT["small"]) for text in _caption(circuit))
    headings = [_heading(column, pitch) for column in graph.columns]
    vertical = pitch < 0.5
    colours = _box_colours(graph)
    heading_height = 0.047 * max(map(len, headings)) if vertical else 0.34
    # Frames of heads reach a little above the boxes.
    frames = 0.34 * row if any(node.head is not None for node in graph.nodes.values()) else 0.0
    above = 0.06 + 0.13 * len(title.splitlines()) + heading_height + 0.08 + frames
    per_line = max(1, int(width / 0.95))
    legend_lines = -(-len(colours) // per_line)
    below = 0.12 + 0.1 * len(caption.splitlines()) + 0.13 * legend_lines
    height = row * tallest + above + below

    figure = figure_class(figsize=(width, height))
    axes = figure.add_axes((0.05 / width, below / height, 1 - 0.1 / width, row * tallest / height))
    axes.axis("off")
    axes.set_xlim(-0.5, len(graph.columns) - 0.5)
    axes.set_ylim(-tallest / 2, tallest / 2)
    centers = {key: (float(node.column), graph.rows[key]) for key, node in graph.nodes.items()}
    # Boxes are no wider than their column: an index is never cut, a name or a token is.
    index = max([len(f"v {key[1]}") for key, n in graph.nodes.items() if n.kind != "token"] or [1])
    font = min(font, max(3.0, 0.92 * pitch * 72 / (0.65 * index + 0.7)))
    longest = min(11, max(3, int((0.92 * pitch * 72 / font - 0.7) / 0.65)))
    labels = {
        key: _label(key, node, circuit, tokenizer, longest) for key, node in graph.nodes.items()
    }
    # Half the width of each box, in columns: a letter is at most 0.65 of its size wide.
    halves = {
        key: min(0.46, (0.65 * len(label) + 0.7) * font / 2 / 72 / pitch)
        for key, label in labels.items()
    }
    titles = _draw_heads(axes, graph, centers, min(0.47, 0.21 / pitch))
    _draw_links(
        axes, graph.links, centers, halves=halves, titles=titles, labelled=pitch > 0.6,
        pitch=pitch, row=row,
    )  # fmt: skip
    for key, node in graph.nodes.items():
        _draw_node(axes, centers[key], node, labels[key], font)
    for x, heading in enumerate(headings):
        axes.text(
            x, tallest / 2 + (0.06 + frames) / row, heading, ha="center", va="bottom", color="#444",
            fontsize=FONT["small"], rotation=90 if vertical else 0, linespacing=1.15,
        )  # fmt: skip
    middle = {"ha": "center", "linespacing": 1.25, "parse_math": False}
    figure.text(
        0.5, 1 - 0.06 / height, title, va="top", fontsize=FONT["title"], fontweight="bold", **middle
    )
    figure.text(
        0.5, 0.05 / height, caption, va="bottom", fontsize=FONT["small"], color="#333", **middle
    )
    for i, (kind, colour) in enumerate(colours.items()):
        line, place = divmod(i, per_line)
        among = min(per_line, len(colours) - line * per_line)
        figure.text(
            0.5 + 0.95 * (place - (among - 1) / 2) / width,
            (below - 0.08 - 0.13 * line) / height, kind, ha="center", va="center",
            fontsize=FONT["small"],
            bbox={"boxstyle": "round,pad=0.2", "facecolor": colour, "edgecolor": "#666",
                  "linewidth": 0.5},
        )  # fmt: skip
    return figure


def _box_colours(graph: LayeredGraph) -> dict[str, str]:
    """What a box of each colour is, of those that are drawn."""
    words = {
        "token": "token",
        "act_in": "channel read",
        "q": "query",
        "k": "key",
        "v": "value",
        "post_act": "neuron",
        "resid_delta": "channel written",
    }
    kinds = {node.kind for node in graph.nodes.values()}
    return {word: SITE_COLOURS[kind] for kind, word in words.items() if kind in kinds}


def _heading(column: Column, pitch: float) -> str:
    words = {
        "tokens": "tokens that decide" if pitch < 0.5 else "tokens\nthat decide",
        "qkv": "query, key, value"
        if pitch < 0.5
        else "q · k · v"
        if pitch < 0.9
        else "query · key · value",
    }
    role = words.get(column.role, column.role)
    block = {"attn": "attention", "mlp": "MLP"}.get(column.block, column.block)
    parts = [f"layer {column.layer}", block, role] if column.layer else [role]
    return (" " if pitch < 0.5 else "\n").join(parts)


def _wrapped(text: str, width: float, size: float) -> str:
    """Text in lines of `width` inches: a letter is about half as wide as it is high."""
    return textwrap.fill(text, int(width * 72 / (0.62 * size)), break_long_words=True)


def _draw_heads(
    axes: Any, graph: LayeredGraph, centers: dict[Key, tuple[float, float]], half: float
) -> list[tuple[float, float, float, float]]:
    """A frame around the nodes of each attention head, `2 * half` columns wide.

    Returns:
        Middle, half width and half height of every title.
    """
    from matplotlib.patches import FancyBboxPatch

    heads: dict[tuple[int, int], list[float]] = {}
    for key, node in graph.nodes.items():
        if node.head is not None:
            heads.setdefault((node.column, node.head), []).append(centers[key][1])
    titles = []
    for (x, head), rows in heads.items():
        low, high = min(rows) - 0.5, max(rows) + 0.5
        axes.add_patch(
            FancyBboxPatch(
                (x - half, low), 2 * half, high - low + 0.32,
                boxstyle="round,pad=0,rounding_size=0.06",
                facecolor="#f6f6f6", edgecolor="#c4c4c4", linewidth=0.6, zorder=0,
                clip_on=False,
            )
        )  # fmt: skip
        axes.text(
            x, high + 0.04, f"head {head}", ha="center", va="center", fontsize=FONT["small"],
            color="#444", zorder=6,
            bbox={"boxstyle": "round,pad=0.05", "facecolor": "#f6f6f6", "edgecolor": "none"},
        )  # fmt: skip
        titles.append((x, high + 0.04, half, 0.22))
    return titles


def _draw_links(
    axes: Any,
    links: list[GraphLink],
    centers: dict[Key, tuple[float, float]],
    *,
    halves: dict[Key, float],
    titles: list[tuple[float, float, float, float]],
    labelled: bool,
    pitch: float,
    row: float,
) -> None:
    """Lines, and the weights of the strongest for which there is room."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path as Curve

    strongest = max((abs(link.weight) for link in links), default=0.0) or 1.0
    labelled = labelled and sum(link.kind != "residual" for link in links) <= MAX_LABELLED_EDGES
    # Middle, half width and half height of everything that a label must not cover, in columns
    # and rows.
    taken = [(*centers[key], half, 0.3) for key, half in halves.items()] + titles
    label_half = (
        0.5 * 5 * 0.62 * (FONT["small"] - 0.5) / 72 / pitch,
        0.75 * FONT["small"] / 72 / row,
    )
    for link in sorted(links, key=lambda link: -abs(link.weight)):
        curve = Curve(*_route(link, centers, halves))
        residual = link.kind == "residual"
        colour = RESIDUAL if residual else POSITIVE if link.weight > 0 else NEGATIVE
        axes.add_patch(
            PathPatch(
                curve, facecolor="none", edgecolor=colour, alpha=0.85, zorder=1 if residual else 2,
                linewidth=0.7 if residual else 0.4 + 1.8 * abs(link.weight) / strongest,
                linestyle={"weight": "-", "embed": (0, (3.5, 1.2)), "residual": ":"}[link.kind],
            )
        )  # fmt: skip
        if labelled and not residual:
            spot = _free_spot(_along(curve), label_half, taken)
            if spot is None:  # the strongest come first
                continue
            taken.append((*spot, *label_half))
            axes.text(
                *spot, f"{link.weight:+.2f}", fontsize=FONT["small"] - 0.5, color=colour,
                ha="center", va="center", zorder=4, gid="weight",
                bbox={"boxstyle": "round,pad=0.08", "facecolor": "white", "edgecolor": "none"},
            )  # fmt: skip


def _route(
    link: GraphLink, centers: dict[Key, tuple[float, float]], halves: dict[Key, float]
) -> tuple[list[tuple[float, float]], list[int]]:
    """Vertices and codes of a line from box to box, straight past the columns between."""
    from matplotlib.path import Path as Curve

    (x0, y0), (x1, y1) = centers[link.source], centers[link.target]
    widest: dict[int, float] = {}
    for key, half in halves.items():
        column = int(centers[key][0])
        widest[column] = max(widest.get(column, 0.0), half)
    x, y = x0 + halves[link.source], y0
    points, codes = [(x, y)], [Curve.MOVETO]
    stops = [(int(x0) + i, row) for i, row in enumerate(link.via, 1)]
    for column, row in [*stops, (x1, y1)]:
        half = halves[link.target] if column == x1 else widest.get(int(column), 0.0) + 0.02
        enter = column - half
        middle = (x + enter) / 2
        points += [(middle, y), (middle, row), (enter, row)]
        codes += [Curve.CURVE4] * 3
        x, y = column + half, row
        if column != x1:
            points.append((x, y))
            codes.append(Curve.LINETO)
    return points, codes


def _along(curve: Any) -> list[tuple[float, float]]:
    """Places along a line, from its beginning to its end."""
    shares = [i / 16 for i in range(17)]
    pieces = list(curve.iter_bezier())[1:]
    return [tuple(piece(share)) for piece, _ in pieces for share in shares]


def _free_spot(
    line: list[tuple[float, float]],
    half: tuple[float, float],
    taken: list[tuple[float, float, float, float]],
) -> tuple[float, float] | None:
    """A place on a line, near its middle, where a label covers nothing; `None` if there is none."""
    middle = (len(line) - 1) / 2
    for x, y in sorted(line, key=lambda spot: abs(line.index(spot) - middle)):
        if all(
            abs(x - a) >= half[0] + wide or abs(y - b) >= half[1] + high
            for a, b, wide, high in taken
        ):
            return float(x), float(y)
    return None


def _draw_node(
    axes: Any,
    center: tuple[float, float],
    node: GraphNode,
    label: str,
    font: float,
) -> None:
    token = node.kind == "token"
    axes.text(
        *center, label, ha="center", va="center", fontsize=font, zorder=5, parse_math=False,
        family="monospace" if token else None,
        bbox={
            "boxstyle": "round,pad=0.3", "facecolor": SITE_COLOURS[node.kind],
            "edgecolor": "#666", "linewidth": 0.6,
        },
    )  # fmt: skip


def _label(key: Key, node: GraphNode, circuit: Circuit, tokenizer: Any, longest: int) -> str:
    if node.kind == "token":
        return token_text(tokenizer, key[1], longest)
    if name := circuit.names.get(node_text(key), ""):
        return _short(name, longest)
    return str(key[1]) if node.head is None else f"{node.kind} {key[1]}"


def _short(name: str, longest: int) -> str:
    return name if len(name) <= longest else f"{name[: longest - 1]}…"


def _facts(circuit: Circuit, graph: LayeredGraph) -> str:
    edges = sum(link.kind == "weight" for link in graph.links)
    facts = [
        f"{n} {word}{'' if n == 1 else 's'}"
        for n, word in ((len(circuit), "node"), (edges, "edge"))
    ]
    for name, words in (
        ("circuit_loss", "loss {:.3f} of the circuit alone"),
        ("ablated_loss", "{:.3f} of the model without it"),
        ("calibrated_model_loss", "{:.3f} of the whole model"),
    ):
        if name in circuit.metrics:
            facts.append(words.format(circuit.metrics[name]))
    return f"{circuit.task}: {', '.join(facts)}"


def _caption(circuit: Circuit) -> list[str]:
    lines = []
    example = circuit.example
    if all(name in example for name in ("prompt", "target", "counterfactual_target")):
        prompt = repr(example["prompt"])
        # Cut, it keeps its quotes: the closing one alone would look like a part of the prompt.
        prompt = prompt if len(prompt) <= 110 else f"{prompt[0]}…{prompt[-108:]}"
        lines.append(f"{prompt} → {example['target']!r}, not {example['counterfactual_target']!r}")
    lines.append(
        "orange: positive weight, blue: negative; dashed: embedding and unembedding; "
        "dotted: the same residual channel"
    )
    return lines
