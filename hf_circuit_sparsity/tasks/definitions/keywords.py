"""Tasks in which a keyword decides what may follow."""

import random

from .base import Example, Pair, Split, define
from .words import surround


@define(
    "while_return_true",
    "`while True` goes on with a colon, `return True` ends the line. The answers are the first "
    "tokens of ':\\n' and of '\\n'.",
)
def while_return_true(rng: random.Random, split: Split) -> Pair:
    # The surroundings are chosen for `return`, which cannot stand outside a function.
    template, names = surround(rng, split, "return True")
    returns = template.format(**names)
    loops = returns.removesuffix("return True") + "while True"
    return Example(loops, ":\n"), Example(returns, "\n")
