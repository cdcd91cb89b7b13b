"""Tasks about the arguments of functions."""

import random

from .base import Example, Pair, Split, define
from .words import DOUBLE_STARRED, STARRED, code_before

# A lambda, and what stands in its place: a call, or an attribute as an argument. Which of them has
# as many tokens depends on how many tokens the tokenizer makes of `lambda`.
_CALLEES = ("{h}", "{h}", "{x}.{h}", "{x}.{attr2}")
_ARGUMENTS = ("{x}", "{x}", "{x}.{y}", "{x}.{attr2}")
_LAMBDAS: dict[Split, tuple[tuple[str, str, tuple[str, ...]], ...]] = {
    "train": (
        ("{v} = lambda {w}", "{v} = {call}({w}", _CALLEES),
        ("return lambda {w}", "return {call}({w}", _CALLEES),
        ("{v} = {f}({u}, lambda {w}", "{v} = {f}({u}, {call}.{w}", _ARGUMENTS),
        ("{v}.sort(key=lambda {w}", "{v}.sort(key={call}.{w}", _ARGUMENTS),
    ),
    "test": (
        ("{v}.{attr} = lambda {w}", "{v}.{attr} = {call}({w}", _CALLEES),
        ("{v} = lambda {w}, {u}", "{v} = {call}({w}, {u}", _CALLEES),
        ("yield lambda {w}", "yield {call}({w}", _CALLEES),
        ("{v} = sorted({u}, key=lambda {w}", "{v} = sorted({u}, key={call}.{w}", _ARGUMENTS),
        ("{v} = max({u}, key=lambda {w}", "{v} = max({u}, key={call}.{w}", _ARGUMENTS),
    ),
}


@define(
    "lambda_func",
    "The arguments of a lambda end with a colon, those of a call with a bracket. The answers are "
    "the first tokens of ': ' and of ')\\n'.",
)
def lambda_func(rng: random.Random, split: Split) -> Pair:
    code, replaced, choices = rng.choice(_LAMBDAS[split])
    call = replaced.replace("{call}", rng.choice(choices))
    before, names = code_before(rng, split, call)
    return (
        Example(before + code.format(**names), f": {names['w']}.{names['attr']}\n"),
        Example(before + call.format(**names), ")\n"),
    )


# A function that passes its arguments on; `last` is what it has come to.
_FORWARDERS: dict[Split, tuple[str, ...]] = {
    "train": (
        "def {f}({v}, *{a}, **{k}):\n    return {g}({v}, {last}",
        "def {f}(*{a}, **{k}):\n    return {g}({last}",
        "def {f}({v}, {w}, *{a}, **{k}):\n    {x} = {g}({v}, {last}",
        "def {f}({v}, *{a}, **{k}):\n    {w} = {g}({v})\n    {w}.{h}({last}",
        "    def {f}(self, *{a}, **{k}):\n        return self.{attr}.{g}({last}",
        "class {cls}({base}):\n    def {f}(self, *{a}, **{k}):\n        {base}.{f}(self, {last}",
    ),
    "test": (
        "def {f}({v}=None, *{a}, **{k}):\n    {g}({v}, {last}",
        "def {f}({v}, {w}, *{a}, **{k}):\n    return {v}.{g}({w}, {last}",
        "def {f}(*{a}, **{k}):\n    {v} = {g}()\n    yield {v}({last}",
        "def {f}({v}, *{a}, **{k}):\n    if {v}:\n        return {v}({digit}, {last}",
        "    def {f}(self, {v}, *{a}, **{k}):\n        super().{f}({v}, {last}",
        "class {cls}:\n    def {f}(self, *{a}, **{k}):\n        self.{attr} = {g}({last}",
    ),
}


@define(
    "final_kwarg",
    "A function passes its arguments on: **kwargs come last and close the call, after *args comes "
    "a comma. The answers are the first tokens of ')\\n' and of ', **'.",
)
def final_kwarg(rng: random.Random, split: Split) -> Pair:
    _, names = code_before(rng, split)
    for field, bank in (("a", STARRED), ("k", DOUBLE_STARRED)):
        taken = set(names.values())
        names[field] = rng.choice([name for name in getattr(bank, split) if name not in taken])
    template = rng.choice(_FORWARDERS[split])
    final, other = (
        template.format(**names, last=last) for last in (f"**{names['k']}", f"*{names['a']}")
    )
    return Example(final, ")\n"), Example(other, f", **{names['k']})\n")
