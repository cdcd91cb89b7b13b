"""One self-contained HTML document out of the files in `assets/`, the library and the data.

The data come from a model, its tokenizer and a circuit that others may have made, so nothing of
them is ever HTML: they are JSON in a block that is not executed, the script inserts them as text,
and the page's policy runs no script but the two whose hashes it names, and loads nothing.
"""

import base64
import hashlib
import html
import json
import re
from importlib.resources import files
from typing import Any

SCRIPTS = ("dom", "data", "charts", "graph", "details", "sections", "main")
"""Parts of the page's script, in their order; each may use what those before it define."""


def render_page(data: dict[str, Any]) -> str:
    """The HTML document that shows `data`, as `report_data` makes it."""
    library = _read("vendor/d3/d3.min.js")
    parts = "\n".join(_read(f"assets/{name}.js") for name in SCRIPTS)
    script = f'(() => {{\n"use strict";\n{parts}\n}})();\n'
    style = _read("assets/style.css")
    policy = "; ".join(
        [
            "default-src 'none'",
            f"script-src {_hash(library)} {_hash(script)}",
            f"style-src {_hash(style)}",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )
    contents = {
        "POLICY": policy,
        "TITLE": html.escape(f"{data['task']}: a circuit"),
        "STYLE": style,
        "LIBRARY": library,
        "SCRIPT": script,
        "DATA": json_for_html(data),
    }
    # In one pass: what is put in may well look like a place to put something in.
    return re.sub(r"\{\{(\w+)\}\}", lambda place: contents[place[1]], _read("assets/page.html"))


def json_for_html(data: Any) -> str:
    """JSON that cannot end the script element it stands in, whatever text is in it.

    Raises:
        ValueError: a number is not finite.
    """
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    # Halves of surrogate pairs, which a damaged tokenizer may give, are no UTF-8.
    return text.encode("utf-8", "replace").decode("utf-8")


def _read(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _hash(content: str) -> str:
    digest = hashlib.sha256(content.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
