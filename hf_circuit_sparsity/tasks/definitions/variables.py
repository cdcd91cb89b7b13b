"""Tasks in which the names that stand there decide what comes next."""

import random

from .base import Example, Pair, Split, define
from .words import INDICES, code_before, indentation, surround, with_answers

# Code up to the second value of a swap, and what follows it. Exchanging the two names in the last
# line exchanges the answers.
_SWAPS: dict[Split, tuple[tuple[str, str, str], ...]] = {
    "train": (
        ("", "{0}, {1} = {1},", " {0}\n"),
        ("if {v} > {w}:\n", "{0}, {1} = {1},", " {0}\n"),
        ("if not {x}:\n", "{0}, {1} = {1},", " {0}\n"),
    ),
    "test": (
        ("while {v} < {w}:\n", "{0}, {1} = {1},", " {0}\n"),
        ("if {v} == {x}:\n", "{0}, {1} = {1},", " {0}\n"),
        ("", "({0}, {1}) = ({1},", " {0})\n"),
    ),
}


@define(
    "var_swap",
    "`a, b = b,` goes on with a. The answers are the first tokens of the two names, with the space "
    "before them.",
)
def var_swap(rng: random.Random, split: Split) -> Pair:
    head, line, answer = rng.choice(_SWAPS[split])
    template, names = surround(rng, split, head + line)
    names = with_answers(rng, split, names)
    before = template.removesuffix(line)
    if head:
        before += indentation(before.removesuffix("\n")) + "    "
    before = before.format(**names)
    one, other = (
        Example(before + line.format(*order, **names), answer.format(*order))
        for order in ((names["v"], names["w"]), (names["w"], names["v"]))
    )
    return one, other


# Code up to the end of `for i, x in` or `for i in`. Where the loop has no second variable, an
# argument list has it, so that both prompts have the same tokens in another order.
_LOOPS: dict[Split, tuple[str, ...]] = {
    "train": (
        "{u} = {f}({w}{argument})\nfor {i}{variable} in",
        "{f}({w}{argument})\nfor {i}{variable} in",
        "import {module}\n\n{u} = {module}.{f}({w}{argument})\nfor {i}{variable} in",
        "def {f}({w}{argument}):\n    for {i}{variable} in",
        "def {f}({w}{argument}):\n    {u} = {g}({w})\n    for {i}{variable} in",
        "def {f}({w}{argument}):\n    if {w}:\n        for {i}{variable} in",
        "    def {f}(self{argument}):\n        for {i}{variable} in",
    ),
    "test": (
        "{u} = {w}.{f}({v}{argument})\nfor {i}{variable} in",
        "{u} = {f}({w}{argument}) + {digit}\nfor {i}{variable} in",
        "with {f}({w}{argument}) as {u}:\n    for {i}{variable} in",
        "def {f}({w}, {v}{argument}):\n    {u} = {v}.{y}\n    for {i}{variable} in",
        "def {f}({w}{argument}=None):\n    for {i}{variable} in",
        "class {cls}:\n    def {f}(self{argument}):\n        for {i}{variable} in",
        "    def {f}(self, {w}{argument}):\n        {u} = {w}\n        for {i}{variable} in",
    ),
}


@define(
    "enumerate_range",
    "`for i, x in` goes on with enumerate, `for i in` with range. The answers are the first tokens "
    "of the two names.",
)
def enumerate_range(rng: random.Random, split: Split) -> Pair:
    _, names = code_before(rng, split)
    free = [name for name in getattr(INDICES, split) if name not in names.values()]
    names["i"] = rng.choice(free)
    template = rng.choice(_LOOPS[split])
    second = f", {names['x']}"
    pairs = template.format(**names, argument="", variable=second)
    numbers = template.format(**names, argument=second, variable="")
    enumerated, counted = (f" {f}({names['w']}):\n" for f in ("enumerate", "range"))
    return Example(pairs, enumerated), Example(numbers, counted)
