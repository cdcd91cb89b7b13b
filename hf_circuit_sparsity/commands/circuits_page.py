"""The page that leads to the pages of several circuits."""

from collections.abc import Mapping
from html import escape
from urllib.parse import quote

from ..circuits.circuit import Circuit

_STYLE = """
:root { color-scheme: light dark; }
body { margin: 0 auto; max-width: 56rem; padding: 2rem 1.5rem;
       font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; }
th, td { padding: .5rem .75rem; text-align: right; border-bottom: 1px solid #8884; }
th:first-child, td:first-child { text-align: left; }
p { opacity: .75; }
"""


def circuits_page(title: str, circuits: Mapping[str, Circuit], pages: Mapping[str, str]) -> str:
    """HTML with a row per circuit: a link to its page, its size and its losses.

    Args:
        title: of the page.
        circuits: by name.
        pages: name → file beside this page.
    """
    rows = "\n".join(
        f'<tr><td><a href="{escape(quote(pages[name]))}">{escape(name)}</a></td>'
        f"<td>{len(circuit)}</td>"
        + "".join(f"<td>{_number(circuit, key, form)}</td>" for key, form in _NUMBERS)
        + "</tr>"
        for name, circuit in circuits.items()
    )
    head = "".join(
        f"<th>{name}</th>"
        for name in ("circuit", "nodes", "edges", "whole model", "circuit alone", "model without")
    )
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n<table>\n<tr>{head}</tr>\n{rows}\n</table>\n"
        "<p>The last three columns are task losses in nats; guessing is 0.693.</p>\n"
        "</body>\n</html>\n"
    )


_NUMBERS = (
    ("edges", ",.0f"),
    ("model_loss", ".3f"),
    ("circuit_loss", ".3f"),
    ("ablated_loss", ".3f"),
)


def _number(circuit: Circuit, key: str, form: str) -> str:
    value = circuit.metrics.get(key)
    return "–" if value is None else format(value, form)
