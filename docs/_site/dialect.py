"""[`Name`] of our docstrings is a cross-reference to the public name, and else only code."""

import re

import griffe

import hf_circuit_sparsity

NAME = re.compile(r"\[`([A-Za-z_.]+)`\](?![\[(])")

# `name (type):` of an entry; the generator sets the type in code by itself.
TYPE = re.compile(r"^(\s+\w+ \()(.*)(\):)", flags=re.MULTILINE)


def _link(match: re.Match) -> str:
    name = match[1]
    if name.split(".")[0] in hf_circuit_sparsity.__all__:
        return f"[`{name}`][hf_circuit_sparsity.{name.split('.')[0]}]"
    return f"`{name}`"


def _plain_type(match: re.Match) -> str:
    return match[1] + re.sub(r"[\[\]`]", "", match[2]) + match[3]


class Dialect(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **kwargs) -> None:
        if obj.docstring:
            text = TYPE.sub(_plain_type, obj.docstring.value)
            obj.docstring.value = NAME.sub(_link, text)
