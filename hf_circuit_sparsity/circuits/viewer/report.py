"""One self-contained HTML document out of the files in `assets/`, the library and the data.

The data come from a model, its tokenizer and a circuit that others may have made, so nothing of
them is ever HTML: they are JSON in a block that is not executed, the script inserts them as text,
and the page's policy runs no script but the two whose hashes it names, and loads nothing.
"""

import base64
import hashlib
import os
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment
from torch import nn

from ...files import replacing
from ...tasks.binary_task import BinaryTask
from ..ablation import ReferenceTokens
from ..circuit import Circuit
from .report_data import ReportConfig, report_data

SCRIPTS = (
    "dom",
    "data",
    "charts",
    "layers",
    "tokens",
    "graph",
    "examples",
    "details",
    "sections",
    "notes",
    "views",
    "main",
)
"""Parts of the page's script, in their order; each may use what those before it define."""


def write_report(
    circuit: Circuit,
    path: str | os.PathLike,
    model: nn.Module,
    tokenizer: Any,
    *,
    task: BinaryTask | None = None,
    reference: ReferenceTokens = None,
    config: ReportConfig | None = None,
    program: str | None = None,
    progress: bool = True,
) -> Path:
    """Write a page on which a person sees what the circuit does: one HTML file.

    It needs no network and no server, and is a static Space as it is. What it shows is measured
    anew: ablation effects, activations, attention, the loss of smaller circuits.

    Args:
        circuit: of `model`.
        path: where to, e.g. `index.html`.
        model: the model the circuit was cut out of.
        tokenizer: the model's.
        task: the task it was found for; that of [`Circuit.load_task`] if not given.
        reference: sample of the pretraining distribution for examples; see [`find_circuit`].
        config: how many prompts, tokens and examples.
        program: name of a file beside the page to link, as [`Circuit.to_program`] writes it.
        progress: show progress bars.

    Returns:
        The path.

    Raises:
        ValueError: an empty circuit, one of another model, or of a task that is neither built in
            nor stored with it and was not passed.
    """
    data = report_data(
        circuit, model, tokenizer, task=task, reference=reference, config=config, progress=progress
    )
    page = render_page(data, program)
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return Path(path)


def render_page(data: dict[str, Any], program: str | None = None) -> str:
    """The HTML document that shows `data`, as [`report_data`] makes it, and links a program.

    Raises:
        ValueError: a number is not finite.
    """
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
    environment = Environment(autoescape=True)
    # Pure ASCII: a damaged tokenizer may give halves of surrogate pairs, which are no UTF-8.
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    page = environment.from_string(_read("assets/page.html")).render(
        policy=policy, style=style, library=library, script=script, data=data,
        program=program and quote(program),
    )  # fmt: skip
    return page.encode("utf-8", "replace").decode("utf-8")


def _read(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _hash(content: str) -> str:
    digest = hashlib.sha256(content.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
