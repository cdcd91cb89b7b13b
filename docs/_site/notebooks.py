"""Notebooks as pages of the site: their Markdown, their code, and the outputs that they hold."""

import base64
import json
import re
from pathlib import Path

TERMINAL = re.compile(r"\x1b\[[0-9;]*m")


def pages_of_notebook(path: Path) -> dict[str, str | bytes]:
    """What the site shows of a notebook: a page, and the pictures in its outputs.

    Args:
        path: of the notebook, whose outputs are in it.

    Returns:
        The contents by file name; the first is the page, Markdown named as the notebook is.
    """
    notebook = json.loads(path.read_text(encoding="utf-8"))
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(_fenced(source, "python"))
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                name = f"{path.stem}_{len(pictures)}.png"
                pictures[name] = base64.b64decode("".join(data["image/png"]))
                parts.append(f"![{_alternative(source)}]({name})")
            elif "text/markdown" in data:
                parts.append("".join(data["text/markdown"]))
            else:
                text = "".join(output.get("text", data.get("text/plain", "")))
                parts.append(_fenced(TERMINAL.sub("", text).rstrip(), "text"))
    parts.insert(1, f"*This page is the notebook `examples/notebooks/{path.name}`, as it ran.*")
    return {f"{path.stem}.md": "\n\n".join(parts) + "\n", **pictures}


def _fenced(text: str, language: str) -> str:
    ticks = "`" * (max([2, *map(len, re.findall("`+", text))]) + 1)
    return f"{ticks}{language}\n{text}\n{ticks}"


def _alternative(source: str) -> str:
    """A picture is described by the comment that begins its cell."""
    return source.splitlines()[0].lstrip("# ") if source.startswith("#") else "output"
