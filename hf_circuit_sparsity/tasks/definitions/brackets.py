"""Tasks about what is open and must be closed."""

import random

from .base import Example, Pair, Split, define
from .words import VARIABLES, surround

# Code up to the bracket that opens the list. `]` or `]]`, and then the line ends.
TEMPLATES: dict[Split, tuple[str, ...]] = {
    "train": ("{v} = [", "return [", "self.{attr} = [", "{v}.{attr} = [", "{v} = {w} or ["),
    "test": ("{v} += [", "yield [", "{v} = {w} + [", "self.{attr} += [", "assert {v} == ["),
}


@define(
    "bracket_counting",
    "Close a list of numbers at the end of the line: ] when one bracket is open, ]] when two are. "
    "Where the tokenizer has no ]] (as OpenAI's), the answers are the first tokens of ']\\n' and "
    "of ']]\\n': a bracket that ends the line against one that is followed by another.",
)
def bracket_counting(rng: random.Random, split: Split) -> Pair:
    template, names = surround(rng, split, rng.choice(TEMPLATES[split]))
    opened = template.format(**names)
    numbers = ", ".join([_number(rng), *(_element(rng, split) for _ in range(rng.randrange(1, 7)))])
    # The flat list has a digit where the nested one has its second bracket: the prompts then differ
    # in one character and, where digits are tokens, in one token.
    flat = Example(f"{opened}{rng.randrange(1, 10)}{numbers}", "]\n")
    nested = Example(f"{opened}[{numbers}", "]]\n")
    return flat, nested


def _number(rng: random.Random) -> str:
    return str(rng.randrange(10 ** rng.randrange(1, 3)))


def _element(rng: random.Random, split: Split) -> str:
    kind = rng.random()
    if kind < 0.7:
        return _number(rng)
    if kind < 0.8:
        number = _number(rng)
        return number if number == "0" else f"-{number}"
    if kind < 0.9:
        return f"{rng.randrange(10)}.{rng.randrange(10)}"
    return VARIABLES.choice(rng, split)


# Up to the bracket that opens a list or a set.
_OPENED: dict[Split, tuple[str, ...]] = {
    "train": ("{v} = ", "return ", "self.{attr} = ", "{v}.{attr} = ", "return {v} in "),
    "test": ("{v} = {w} = ", "yield ", "assert {v} in ", "self.{attr} = {v} or ", "assert {v} == "),
}


@define(
    "bracket_brace",
    "Close a list with ] and a set with }. The answers are the first tokens of ']\\n' and of "
    "'}\\n'.",
)
def bracket_brace(rng: random.Random, split: Split) -> Pair:
    template, names = surround(rng, split, rng.choice(_OPENED[split]))
    opened = template.format(**names)
    elements = ", ".join(_element(rng, split) for _ in range(rng.randrange(2, 8)))
    return Example(f"{opened}[{elements}", "]\n"), Example(f"{opened}{{{elements}", "}\n")
