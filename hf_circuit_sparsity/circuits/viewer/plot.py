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
    heading_height = 0.055 * max(map(len, headings)) if vertical else 0.34
    above = 0.06 + 0.13 * len(title.splitlines()) + heading_height + 0.08
    below = 0.12 + 0.1 * len(caption.splitlines())
    height = row * tallest + above + below

    figure = figure_class(figsize=(width, height))
    axes = figure.add_axes((0.05 / width, below / height, 1 - 0.1 / width, row * tallest / height))
    axes.axis("off")
    axes.set_xlim(-0.5, len(graph.columns) - 0.5)
    axes.set_ylim(-tallest / 2, tallest / 2)
    centers = {key: (float(node.column), graph.rows[key]) for key, node in graph.nodes.items()}
    _draw_heads(axes, graph, centers, min(0.47, 0.21 / pitch))
    _draw_links(axes, graph.links, centers, labelled=pitch > 0.6, aspect=pitch / row)
    for key, node in graph.nodes.items():
        name = circuit.names.get(node_text(key), "")
        _draw_node(axes, centers[key], node, tokenizer, font, name)
    for x, heading in enumerate(headings):
        axes.text(
            x, tallest / 2 + 0.08 / row, heading, ha="center", va="bottom", color="#444",
            fontsize=FONT["small"], rotation=90 if vertical else 0, linespacing=1.15,
        )  # fmt: skip
    middle = {"ha": "center", "linespacing": 1.25, "parse_math": False}
    figure.text(
        0.5, 1 - 0.06 / height, title, va="top", fontsize=FONT["title"], fontweight="bold", **middle
    )
    figure.text(
        0.5, 0.05 / height, caption, va="bottom", fontsize=FONT["small"], color="#333", **middle
    )
    return figure


def _heading(column: Column, pitch: float) -> str:
    words = {
        "tokens": "tokens that decide" if pitch < 0.5 else "tokens\nthat decide",
        "qkv": "qkv" if pitch < 0.5 else "q · k · v" if pitch < 0.9 else "query · key · value",
    }
    role = words.get(column.role, column.role)
    parts = [f"layer {column.layer}", column.block, role] if column.layer else [role]
    return (" " if pitch < 0.5 else "\n").join(parts)


def _wrapped(text: str, width: float, size: float) -> str:
    """Text in lines of `width` inches: a letter is about half as wide as it is high."""
    return textwrap.fill(text, int(width * 72 / (0.62 * size)), break_long_words=True)


def _draw_heads(
    axes: Any, graph: LayeredGraph, centers: dict[Key, tuple[float, float]], half: float
) -> None:
    """A frame around the nodes of each attention head, `2 * half` columns wide."""
    from matplotlib.patches import FancyBboxPatch

    heads: dict[tuple[int, int], list[float]] = {}
    for key, node in graph.nodes.items():
        if node.head is not None:
            heads.setdefault((node.column, node.head), []).append(centers[key][1])
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


def _draw_links(
    axes: Any,
    links: list[GraphLink],
    centers: dict[Key, tuple[float, float]],
    *,
    labelled: bool,
    aspect: float,
) -> None:
    from matplotlib.bezier import BezierSegment
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path as Curve

    strongest = max((abs(link.weight) for link in links), default=0.0) or 1.0
    labelled = labelled and sum(link.kind != "residual" for link in links) <= MAX_LABELLED_EDGES
    labels: list[tuple[float, float]] = []
    for link in sorted(links, key=lambda link: abs(link.weight)):
        (x0, y0), (x1, y1) = centers[link.source], centers[link.target]
        middle = (x0 + x1) / 2
        points = [(x0, y0), (middle, y0), (middle, y1), (x1, y1)]
        residual = link.kind == "residual"
        colour = RESIDUAL if residual else POSITIVE if link.weight > 0 else NEGATIVE
        axes.add_patch(
            PathPatch(
                Curve(points, [Curve.MOVETO, *[Curve.CURVE4] * 3]),
                facecolor="none", edgecolor=colour, alpha=0.85, zorder=1 if residual else 2,
                linewidth=0.7 if residual else 0.4 + 1.8 * abs(link.weight) / strongest,
                linestyle={"weight": "-", "embed": (0, (3.5, 1.2)), "residual": ":"}[link.kind],
            )
        )  # fmt: skip
        if labelled and not residual:
            # Where on its line a label is farthest from those already there; labels are wider
            # than high, so what is beside is nearer than what is above.
            spots = BezierSegment(points)([0.5, 0.42, 0.58, 0.35, 0.65]).tolist()
            spot = max(
                spots,
                key=lambda p: min(
                    ((aspect * (p[0] - q[0]) / 2.5) ** 2 + (p[1] - q[1]) ** 2 for q in labels),
                    default=0.0,
                ),
            )
            labels.append(spot)
            axes.text(
                *spot, f"{link.weight:+.2f}", fontsize=FONT["small"] - 0.5, color=colour,
                ha="center", va="center", zorder=4,
                bbox={"boxstyle": "round,pad=0.08", "facecolor": "white", "edgecolor": "none"},
            )  # fmt: skip


def _draw_node(
    axes: Any,
    center: tuple[float, float],
    node: GraphNode,
    tokenizer: Any,
    font: float,
    name: str,
) -> None:
    token = node.kind == "token"
    label = token_text(tokenizer, node.key[1], 11) if token else _short(name) or str(node.key[1])
    if node.head is not None and not name:
        label = f"{node.kind} {label}"
    axes.text(
        *center, label, ha="center", va="center", fontsize=font, zorder=5, parse_math=False,
        family="monospace" if token else None,
        bbox={
            "boxstyle": "round,pad=0.3", "facecolor": SITE_COLOURS[node.kind],
            "edgecolor": "#666", "linewidth": 0.6,
        },
    )  # fmt: skip


def _short(name: str, longest: int = 11) -> str:
    return name if len(name) <= longest else f"{name[: longest - 1]}…"


def _facts(circuit: Circuit, graph: LayeredGraph) -> str:
    edges = sum(link.kind == "weight" for link in graph.links)
    facts = [f"{len(circuit)} nodes", f"{edges} edges"]
    for name, words in (
        ("circuit_loss", "loss {:.3f} alone"),
        ("ablated_loss", "{:.3f} without it"),
        ("model_loss", "{:.3f} whole model"),
    ):
        if name in circuit.metrics:
            facts.append(words.format(circuit.metrics[name]))
    return f"{circuit.task}: {', '.join(facts)}"


def _caption(circuit: Circuit) -> list[str]:
    lines = []
    example = circuit.example
    if all(name in example for name in ("prompt", "target", "counterfactual_target")):
        prompt = repr(example["prompt"])
        prompt = prompt if len(prompt) <= 110 else "…" + prompt[-109:]
        lines.append(f"{prompt} → {example['target']!r}, not {example['counterfactual_target']!r}")
    lines.append(
        "orange: positive weight, blue: negative; dashed: embedding and unembedding; "
        "dotted: the same residual channel"
    )
    return lines
