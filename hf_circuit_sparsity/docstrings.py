"""Reading what docstrings say of arguments, for help on a command line."""

import re


def documented(docstring: str) -> dict[str, str]:
    """What a docstring says of each entry of its `Args:`, in one line: name → text."""
    entries = re.findall(r"^ +(\w+) \(.*?\): (.+(?:\n {12}.+)*)", docstring, re.MULTILINE)
    return {name: " ".join(text.replace("`", "").split()) for name, text in entries}
