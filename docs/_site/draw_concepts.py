"""The pictures of docs/concepts.md, drawn as SVG: python docs/_site/draw_concepts.py"""

import random
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "concepts"
INK, GREY, LIGHT = "#1b1b1b", "#8a8a8a", "#e4e4e4"
NODE, EDGE, NEGATIVE = "#6a3d9a", "#c65300", "#0067a5"


def drawing(width: int, height: int, title: str, *parts: str) -> str:
    """An SVG on white, so that it is seen on dark pages too; `title` is read to the blind."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" role="img" font-family="sans-serif" font-size="12">'
        f'\n<title>{title}</title>\n<rect width="{width}" height="{height}" rx="8" fill="#fff"/>'
    )
    return "\n".join([head, *parts, "</svg>\n"])


def text(x: float, y: float, words: str, colour: str = INK, anchor: str = "middle") -> str:
    """Words whose base line is at y."""
    return f'<text x="{x:g}" y="{y:g}" fill="{colour}" text-anchor="{anchor}">{words}</text>'


def line(*points: tuple[float, float], colour: str = INK, width: float = 1.5, dash: int = 0) -> str:
    """A line through points."""
    path = " ".join(f"{x:g},{y:g}" for x, y in points)
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    stroke = f'stroke="{colour}" stroke-width="{width:g}"{dashed}'
    return f'<polyline points="{path}" fill="none" {stroke}/>'


def arrow(
    *points: tuple[float, float], colour: str = INK, width: float = 1.5, dash: int = 0
) -> str:
    """A line with a head at its end, which goes straight right, up or down."""
    (x0, y0), (x, y) = points[-2:]
    dx, dy = (x > x0) - (x < x0), (y > y0) - (y < y0)
    if dx:  # an oblique line ends in a head to the right as well
        dy = 0
    back, side = (x - 8 * dx, y - 8 * dy), (4 * dy, 4 * dx)
    corners = [
        (x, y),
        (back[0] + side[0], back[1] + side[1]),
        (back[0] - side[0], back[1] - side[1]),
    ]
    head = " ".join(f"{a:g},{b:g}" for a, b in corners)
    shaft = line(*points[:-1], back, colour=colour, width=width, dash=dash)
    return f'{shaft}<polygon points="{head}" fill="{colour}"/>'


def box(x: float, y: float, words: str, colour: str = NODE, width: float = 84) -> str:
    """A rounded box around (x, y)."""
    return (
        f'<rect x="{x - width / 2:g}" y="{y - 13:g}" width="{width:g}" height="26" rx="6" '
        f'fill="#fff" stroke="{colour}" stroke-width="1.8"/>{text(x, y + 4, words)}'
    )


def dot(x: float, y: float, fill: str, stroke: str, radius: float = 7) -> str:
    """A circle."""
    return (
        f'<circle cx="{x:g}" cy="{y:g}" r="{radius:g}" fill="{fill}" stroke="{stroke}" '
        'stroke-width="1.5"/>'
    )


def draw_sites() -> str:
    """The eight sites of a layer, and the matrices between them."""
    sites = [
        box(122, 90, "attn.act_in"), box(268, 40, "attn.q", width=60),
        box(268, 90, "attn.k", width=60), box(268, 140, "attn.v", width=60),
        box(520, 90, "attn.resid_delta", width=106), box(664, 90, "mlp.act_in"),
        box(802, 90, "mlp.post_act"), box(944, 90, "mlp.resid_delta", width=106),
    ]  # fmt: skip
    matrices = [
        *(arrow((165, 90), (237, y), colour=EDGE) for y in (40, 90, 140)),
        text(200, 160, "attn.c_attn", EDGE),
        arrow((407, 90), (466, 90), colour=EDGE), text(436, 78, "c_proj", EDGE),
        arrow((707, 90), (759, 90), colour=EDGE), text(733, 78, "c_fc", EDGE),
        arrow((845, 90), (890, 90), colour=EDGE), text(867, 78, "c_proj", EDGE),
    ]  # fmt: skip
    rest = [
        arrow((20, 205), (1010, 205), width=3), text(24, 226, "residual stream", anchor="start"),
        text(700, 226, "orange: matrices, whose nonzero weights are the edges", EDGE),
        arrow((48, 205), (48, 90), (79, 90), dash=4), text(40, 150, "norm", GREY, "end"),
        arrow((596, 205), (596, 90), (621, 90), dash=4), text(604, 150, "norm", GREY, "start"),
        *(line((299, y), (337, 90), colour=GREY, dash=4) for y in (40, 90, 140)),
        box(372, 90, "attention", GREY, 70),
        *(arrow((x, 104), (x, 202)) + text(x + 8, 150, "added", GREY, "start") for x in (520, 944)),
    ]  # fmt: skip
    return drawing(1030, 240, "The eight node sites of a layer", *rest, *matrices, *sites)


def draw_sparsity() -> str:
    """Weights before and after the projection, and activations before and after AbsTopK."""
    draw = random.Random(3)
    n, cell = 10, 13
    weights = [[draw.gauss(0, 1) for _ in range(n)] for _ in range(n)]
    bound = sorted((abs(w) for row in weights for w in row), reverse=True)[20]
    parts = []
    for left, kept in ((20, False), (210, True)):
        for i, row in enumerate(weights):
            for j, w in enumerate(row):
                shown = not kept or abs(w) > bound
                colour = (EDGE if w > 0 else NEGATIVE) if shown else "#fff"
                parts.append(
                    f'<rect x="{left + j * cell}" y="{40 + i * cell}" width="{cell}" '
                    f'height="{cell}" fill="{colour}" stroke="{LIGHT}" '
                    f'fill-opacity="{min(1, 0.15 + abs(w) / 2.2):.2f}"/>'
                )
    values = [draw.gauss(0, 1) for _ in range(12)]
    bound = sorted(map(abs, values), reverse=True)[3]
    for left, kept in ((390, False), (590, True)):
        parts.append(line((left, 105), (left + 150, 105), colour=GREY, width=1))
        for i, v in enumerate(values):
            if not kept or abs(v) > bound:
                top, height = min(105, 105 - 28 * v), abs(28 * v)
                colour = EDGE if v > 0 else NEGATIVE
                parts.append(
                    f'<rect x="{left + 3 + i * 12}" y="{top:.1f}" width="9" height="{height:.1f}" '
                    f'fill="{colour}"/>'
                )
    parts += [
        text(85, 26, "weights after a step"), text(275, 26, "the largest fifth is kept"),
        arrow((158, 105), (202, 105)), text(465, 26, "a token's activations"),
        text(665, 26, "AbsTopK keeps a quarter"), arrow((546, 105), (584, 105)),
    ]  # fmt: skip
    return drawing(760, 190, "Weight sparsity and activation sparsity", *parts)


def draw_circuit() -> str:
    """Which nodes run and which are fixed: in the model, the circuit alone, and all but it."""
    chosen = {(0, 1), (1, 0), (1, 2), (2, 2), (3, 1)}
    links = [
        ((0, 1), (1, 0)),
        ((0, 1), (1, 2)),
        ((1, 0), (2, 2)),
        ((1, 2), (2, 2)),
        ((2, 2), (3, 1)),
    ]
    others = [
        ((0, 0), (1, 1)), ((0, 2), (1, 3)), ((0, 3), (1, 3)), ((1, 1), (2, 0)), ((1, 1), (2, 1)),
        ((1, 3), (2, 3)), ((2, 0), (3, 0)), ((2, 1), (3, 3)), ((2, 3), (3, 2)),
    ]  # fmt: skip
    parts = []
    panels = [("the model", (True, True)), ("the circuit alone", (True, False)),
              ("the model without it", (False, True))]  # fmt: skip
    for panel, (name, (inside, outside)) in enumerate(panels):
        left = 40 + 250 * panel

        def at(node: tuple[int, int], left: int = left) -> tuple[float, float]:
            return left + 52 * node[0], 50 + 36 * node[1]

        parts.append(text(left + 78, 24, name))
        for group, runs in ((others, outside), (links, inside)):
            colour, width = (EDGE, 2) if runs and group is links else (GREY, 1)
            parts += [line(at(a), at(b), colour=colour, width=width) for a, b in group if runs]
        for node in [(i, j) for i in range(4) for j in range(4)]:
            runs = inside if node in chosen else outside
            colour = NODE if node in chosen else GREY
            x, y = at(node)
            parts.append(dot(x, y, colour if runs else "#fff", colour))
            if not runs:
                parts.append(line((x - 4, y), (x + 4, y), colour=colour))
    parts += [
        dot(60, 200, NODE, NODE), text(74, 204, "in the circuit", anchor="start"),
        dot(210, 200, GREY, GREY), text(224, 204, "not in it", anchor="start"),
        dot(330, 200, "#fff", GREY), line((326, 200), (334, 200), colour=GREY),
        text(344, 204, "fixed at its mean over the reference text", anchor="start"),
    ]  # fmt: skip
    return drawing(760, 222, "Mean ablation of a circuit and of its complement", *parts)


def draw_bridge() -> str:
    """Two streams with an encoder and a decoder at every location."""
    steps = ["embed", "attn", "MLP", "attn", "MLP", "logits"]
    parts = []
    for y, name, colour in ((60, "dense (yours, frozen)", NEGATIVE), (150, "sparse", NODE)):
        parts += [arrow((40, y), (726, y), colour=colour, width=2.5)]
        parts += [text(40, y - 34 if y < 100 else y + 34, name, colour, "start")]
        parts += [box(70 + 122 * i, y, step, colour, 58) for i, step in enumerate(steps)]
    for location in range(5):
        x = 131 + 122 * location
        parts += [
            dot(x, 60, "#fff", INK, 5), dot(x, 150, "#fff", INK, 5),
            arrow((x - 7, 66), (x - 7, 144), colour=EDGE), arrow((x + 7, 144), (x + 7, 66)),
            text(x, 40, str(location), GREY),
        ]  # fmt: skip
    parts += [
        text(180, 205, "↓ encoder: linear, AbsTopK", EDGE, "start"),
        text(400, 205, "↑ decoder: linear", anchor="start"),
        text(641, 40, "location", GREY, "start"),
    ]  # fmt: skip
    return drawing(760, 222, "A bridge between a dense and a sparse model", *parts)


PICTURES = {
    "sites.svg": draw_sites, "sparsity.svg": draw_sparsity,
    "circuit.svg": draw_circuit, "bridge.svg": draw_bridge,
}  # fmt: skip

if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, draw in PICTURES.items():
        (FOLDER / name).write_text(draw(), encoding="utf-8")
