"""Text of others inside Markdown: it shows as it is and can be neither markup nor code.

Names of tasks and models, tokens and prompts come from files that anyone may have written.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any

NOT_MEASURED = "not measured"
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "@": "&#64;"}


def visible(value: Any) -> str:
    """On one line, with escapes in the place of what does not print."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(value)
    )


def text(value: Any) -> str:
    """For a sentence or a table's cell."""
    escaped = re.sub(
        r"[\\`*_\[\]#|~$!{}&<>@]",
        lambda match: _ENTITIES.get(match[0], f"\\{match[0]}"),
        visible(value),
    )
    # Bare addresses would become links.
    return escaped.replace("://", ":&#47;&#47;").replace("www.", "www&#46;")


def code(value: Any) -> str:
    """In a fixed-width font, within a sentence or a table's cell."""
    return f"<code>{text(value)}</code>"


def block(value: str) -> str:
    """Lines of their own in a fixed-width font."""
    lines = "\n".join(visible(line) for line in value.split("\n"))
    longest = max((len(run) for run in re.findall("`+", lines)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{lines}\n{fence}"


def python(value: str) -> str:
    """A string literal for a block of Python."""
    return repr(value).replace("`", r"\x60")


def number(value: float | None, form: str = ".3f") -> str:
    """A measured number, or that it was not measured."""
    return NOT_MEASURED if value is None else format(value, form)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are Markdown already."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
