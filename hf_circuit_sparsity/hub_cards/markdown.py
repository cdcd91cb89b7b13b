"""Text of others inside Markdown: it shows as it is and can be neither markup nor code.

Names of tasks and models, tokens and prompts come from files that anyone may have written. A
template escapes every value with [`text`]; only what is of the type [`Markdown`] goes in as it is.
"""

import re
from collections.abc import Iterable
from typing import Any
from urllib.parse import quote

NOT_MEASURED = "not measured"
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "@": "&#64;"}


class Markdown(str):
    """Markdown that was made here, and that a template need not escape."""


def visible(value: Any) -> str:
    """On one line, with escapes in the place of what does not print."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(value)
    )


def text(value: Any) -> Markdown:
    """For a sentence or a table's cell."""
    escaped = re.sub(
        r"[\\`*_\[\]#|~$!{}&<>@]",
        lambda match: _ENTITIES.get(match[0], f"\\{match[0]}"),
        visible(value),
    )
    # Bare addresses would become links.
    return Markdown(escaped.replace("://", ":&#47;&#47;").replace("www.", "www&#46;"))


def code(value: Any) -> Markdown:
    """In a fixed-width font, within a sentence or a table's cell."""
    return Markdown(f"<code>{text(value)}</code>")


def codes(values: Iterable[Any], separator: str = ", ") -> Markdown:
    """Several values, each in a fixed-width font."""
    return Markdown(separator.join(map(code, values)))


def with_code(value: str) -> Markdown:
    """A sentence in which pairs of backticks enclose code, and that is no Markdown otherwise."""
    parts = enumerate(value.split("`"))
    return Markdown("".join(code(part) if i % 2 else text(part) for i, part in parts))


def block(value: str) -> Markdown:
    """Lines of their own in a fixed-width font."""
    lines = "\n".join(visible(line) for line in value.split("\n"))
    longest = max((len(run) for run in re.findall("`+", lines)), default=0)
    fence = "`" * max(3, longest + 1)
    return Markdown(f"{fence}text\n{lines}\n{fence}")


def python(value: str) -> Markdown:
    """A string literal for a block of Python."""
    return Markdown(repr(value).replace("`", r"\x60"))


def path(value: str) -> Markdown:
    """A path in a link: what Markdown or HTML could read otherwise is percent-encoded."""
    return Markdown(quote(visible(value)))


def is_number(value: Any) -> bool:
    """Whether a value is a finite number, and so may have been measured."""
    is_real = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_real and abs(value) < float("inf")


def number(value: Any, form: str = ".3f") -> str:
    """A measured number, or that it was not measured."""
    return format(value, form) if is_number(value) else NOT_MEASURED
