"""Tasks about string literals."""

import random

from .base import Example, Pair, Split, define
from .words import WORDS, surround

# Code up to the end of an open string. In each of these the string can be followed by an operator
# (` +`, ` %`, ` in`), and so by a space: then the closing quote is a token of its own. Before a
# bracket or a line end it would be glued to it (`")\n` is one token).
_TEMPLATES: dict[Split, tuple[str, ...]] = {
    "train": (
        "{v} = {quote}{text}",
        "return {quote}{text}",
        "if {v} == {quote}{text}",
        "print({quote}{text}",
        "raise ValueError({quote}{text}",
        "self.{attr} = {quote}{text}",
        "{v}.{f}({quote}{text}",
        "{v} = {w} or {quote}{text}",
    ),
    "test": (
        "{v} += {quote}{text}",
        "yield {quote}{text}",
        "while {v} != {quote}{text}",
        "assert {quote}{text}",
        "raise TypeError({quote}{text}",
        "{v} = {f}({quote}{text}",
        "self.{f}({w}, {quote}{text}",
        "{v} = {w} + {quote}{text}",
    ),
}
# How words become the content of a string; each ends in a letter.
_CONTENTS: dict[Split, tuple[str, ...]] = {
    "train": (
        "{0}",
        "{0} {1}",
        "{0} {1} {2}",
        "{0} {1} {2} {3}",
        "{0} %s",
        "{0}: {1}",
        "{0}.{1}",
        "{0}-{1}",
    ),
    "test": (
        "{0}, {1}",
        "{0} {1} %d",
        "{0}_{1}",
        "{0}/{1}",
        "%s {0} {1}",
        "{0} {1} {2} {3} {0}",
        "{0} {1}, {2} {3}",
    ),
}


@define(
    "single_double_quote",
    "Close a string literal with the quote that opened it: ' or \".",
)
def single_double_quote(rng: random.Random, split: Split) -> Pair:
    template, names = surround(rng, split, rng.choice(_TEMPLATES[split]))
    text = rng.choice(_CONTENTS[split]).format(*WORDS.sample(rng, split, 4))
    single, double = (
        Example(template.format(**names, quote=quote, text=text), f"{quote} ") for quote in "'\""
    )
    return single, double
