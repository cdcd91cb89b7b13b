"""A circuit in a notebook: a small graph and what is known of it, as HTML.

Everything in it may be anybody's text, so the template escapes it.
"""

from functools import cache
from typing import Any

from jinja2 import Environment, Template

from .evaluation.verdict import verdict
from .node_set import NodeSet, node_text

MAX_NODES = 200
"""More are not drawn one by one."""
_WIDTH, _HEIGHT, _BOX = 74, 26, (62, 18)

_TEMPLATE = """\
<div style="font:13px/1.4 sans-serif;max-width:100%">
<b>{{ task }}</b>: {{ size }} nodes{% for fact in facts %}, {{ fact }}{% endfor %}
{% if columns %}<div style="overflow-x:auto"><svg width="{{ width }}" height="{{ height }}" \
role="img" aria-label="The circuit's nodes, by layer" style="background:#fff">
{% for x1, y1, x2, y2, kind in lines %}<line x1="{{ x1 }}" y1="{{ y1 }}" x2="{{ x2 }}" \
y2="{{ y2 }}" stroke="{{ "#888" if kind == "edge" else "#bbb" }}"\
{% if kind != "edge" %} stroke-dasharray="2 3"{% endif %}/>
{% endfor %}{% for x, title in columns %}<text x="{{ x }}" y="12" font-size="11" fill="#555" \
text-anchor="middle">{{ title }}</text>
{% endfor %}{% for x, y, label, title in boxes %}<g><title>{{ title }}</title><rect \
x="{{ x - box[0] / 2 }}" y="{{ y - box[1] / 2 }}" width="{{ box[0] }}" height="{{ box[1] }}" \
rx="9" fill="#eef2f7" stroke="#667"/>\
<text x="{{ x }}" y="{{ y + 4 }}" font-size="11" fill="#000" text-anchor="middle">{{ label }}\
</text></g>
{% endfor %}</svg></div>
<div style="color:#555">Lines: {% if drawn %}weights that were kept; {% endif %}dotted, one node \
writes the channel that the other reads. <code>plot_circuit(circuit, path, model, tokenizer)\
</code> draws all weights.</div>{% endif %}
{% if verdict %}<p>{{ verdict }}</p>{% endif %}
</div>
"""


def circuit_html(circuit: NodeSet) -> str:
    """What a notebook shows of a circuit; well under 100 kB."""
    places, columns = _places(circuit) if len(circuit) <= MAX_NODES else ({}, {})
    height = 30 + _HEIGHT * max((len(c) for c in columns.values()), default=0)
    facts = [
        f"{name} {circuit.metrics[key]:.3f}"
        for key, name in (
            ("circuit_loss", "loss alone"), ("calibrated_model_loss", "of the whole model"),
            ("ablated_loss", "without it"),
        )
        if key in circuit.metrics
    ]  # fmt: skip
    if circuit.kept_edges is not None:
        facts.insert(0, f"{len(circuit.kept_edges)} edges")
    return _template().render(
        task=circuit.task,
        size=len(circuit),
        facts=facts,
        box=_BOX,
        width=_WIDTH * len(columns) + 8,
        height=height,
        columns=[(4 + _WIDTH * (i + 0.5), title) for i, title in enumerate(columns)],
        boxes=[
            (x, y, _label(circuit, node), _title(circuit, node)) for node, (x, y) in places.items()
        ],
        lines=_lines(circuit, places),
        drawn=bool(circuit.kept_edges),
        verdict=verdict(circuit.verification) if circuit.verification else "",
    )


@cache
def _template() -> Template:
    return Environment(autoescape=True).from_string(_TEMPLATE)


def _places(circuit: NodeSet) -> tuple[dict[Any, tuple[float, float]], dict[str, list]]:
    """Node → the middle of its box; and the nodes of each column, by its title."""
    columns: dict[str, list] = {}
    for site, index in circuit:
        # As "0 q": the layer, and the part of attention or MLP.
        title = site.removeprefix("h.").replace(".attn.", " ").replace(".mlp.", " mlp ")
        columns.setdefault(title.replace("resid_delta", "out"), []).append((site, index))
    places = {
        node: (4 + _WIDTH * (i + 0.5), 30 + _HEIGHT * j)
        for i, nodes in enumerate(columns.values())
        for j, node in enumerate(nodes)
    }
    return places, columns


def _lines(circuit: NodeSet, places: dict) -> list[tuple]:
    if not places:
        return []
    ends = [((e[0], e[1]), (e[2], e[3]), "edge") for e in circuit.kept_edges or ()]
    order = list(places)
    ends += [
        (source, target, "residual")
        for at, source in enumerate(order)
        for target in order[at:]
        if source[0].endswith("resid_delta") and target[0].endswith("act_in")
        and source[1] == target[1]
    ]  # fmt: skip
    return [
        (places[s][0] + _BOX[0] / 2, places[s][1], places[t][0] - _BOX[0] / 2, places[t][1], kind)
        for s, t, kind in ends
    ]


def _label(circuit: NodeSet, node: tuple[str, int]) -> str:
    name = circuit.names.get(node_text(node), str(node[1]))
    return name if len(name) <= 9 else f"{name[:8]}…"


def _title(circuit: NodeSet, node: tuple[str, int]) -> str:
    text = node_text(node)
    said = [circuit.names.get(text, ""), circuit.notes.get(text, "")]
    return ": ".join([text, *filter(None, said)])
