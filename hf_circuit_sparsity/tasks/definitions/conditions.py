"""Tasks about `if`: as a statement, inside an expression, or not there at all."""

import random

from .base import Example, Pair, Split, define
from .words import code_before, indentation

# A value chosen by `if`, and an `if` of its own that has as many tokens: where the line end and the
# indentation take one or two of them, the expression has an attribute, a call or a sum.
_TERNARIES: dict[Split, tuple[tuple[str, str], ...]] = {
    "train": (
        ("{v} = {w}.{attr} if {c}", "{v} = {w}\n{indent}if {c}"),
        ("{v} = {w}.{y} if {c}", "{v} = {w}\n{indent}if {c}"),
        ("{v} = {f}({w}) if {c}", "{v} = {w}\n{indent}if {c}"),
        ("return {w} if {c}", "if {w} and {c}"),
    ),
    "test": (
        ("{v} = {w} + {y} if {c}", "{v} = {w}\n{indent}if {c}"),
        ("{v} = {y}.{f}({w}) if {c}", "{v} = {f}({w})\n{indent}if {c}"),
        ("{v} += {w}.{y} if {c}", "{v} += {w}\n{indent}if {c}"),
        ("yield {w} if {c}", "if {w} or {c}"),
    ),
}
_CONDITIONS: dict[Split, tuple[str, ...]] = {
    "train": ("{u}", "{u}.{attr2}", "{u} > {digit}", "{u} is None"),
    "test": ("not {u}", "{u} in {x}", "{u} is not None", "{u} == {digit}", "{u} < {x}"),
}


@define(
    "if_ternary",
    "`value = a if b` goes on with else, the statement `if b` with a colon. The answers are the "
    "first tokens of ' else' and of ':\\n'.",
)
def if_ternary(rng: random.Random, split: Split) -> Pair:
    ternary, statement = rng.choice(_TERNARIES[split])
    before, names = code_before(rng, split, ternary)
    names["indent"] = indentation(before)
    condition = rng.choice(_CONDITIONS[split])
    chosen, branch = (
        before + code.replace("{c}", condition).format(**names) for code in (ternary, statement)
    )
    return Example(chosen, f" else {names['x']}\n"), Example(branch, ":\n")


# The start of a comparison, and a variable of as many tokens.
_COMPARED: dict[Split, tuple[tuple[str, str], ...]] = {
    "train": (
        ("if {v}", "self.{v}"),
        ("if {v}.{attr}", "self.{v}.{attr}"),
        ("if {v}[{digit}]", "self.{v}[{digit}]"),
        ("if {v}.{attr}.{x}", "self.{v}.{attr}.{x}"),
    ),
    "test": (
        ("if {v}[{w}]", "{u}.{v}[{w}]"),
        ("if self.{v}", "{w}.{x}.{v}"),
        ("if {v}.{x}[{digit}]", "self.{v}.{x}[{digit}]"),
        ("if {v}.{x}[{w}]", "self.{v}.{x}[{w}]"),
        ("if self.{v}.{x}", "{w}.{y}.{v}.{x}"),
    ),
}


@define(
    "if_equals",
    "`if value` goes on with a comparison, == ; a variable at the start of a line with an "
    "assignment, = .",
)
def if_equals(rng: random.Random, split: Split) -> Pair:
    compared, assigned, names = _condition_or_variable(rng, split, *rng.choice(_COMPARED[split]))
    value = rng.choice((names["y"], names["digit"], "None"))
    return Example(compared, f" == {value}:\n"), Example(assigned, f" = {value}\n")


# A whole condition, and a variable of as many tokens.
_TESTED: dict[Split, tuple[tuple[str, str], ...]] = {
    "train": (
        ("if {v}", "self.{v}"),
        ("if not {v}", "{u}, {v}"),
        ("if {u}.{v}", "{u}, {v}"),
        ("if {u} == {v}", "self.{u}, {v}"),
    ),
    "test": (
        ("if {u} and {v}", "{u}.{x}, {v}"),
        ("if {u} in {v}", "{w}.{u}, {v}"),
        ("if {w}.{u}.{v}", "{w}.{u}, {v}"),
        ("if not {u} or {v}", "{w}, {u}, {v}"),
    ),
}


@define(
    "var_if",
    "`if value` ends with a colon; a variable at the start of a line goes on with = . The answers "
    "are the first tokens of ':\\n' and of ' ='.",
)
def var_if(rng: random.Random, split: Split) -> Pair:
    tested, assigned, names = _condition_or_variable(rng, split, *rng.choice(_TESTED[split]))
    return Example(tested, ":\n"), Example(assigned, f" = {names['f']}({names['y']})\n")


def _condition_or_variable(
    rng: random.Random, split: Split, condition: str, variable: str
) -> tuple[str, str, dict[str, str]]:
    """The two lines in the same surroundings, which both of them can stand in."""
    # `surround` looks for "self." to know what needs a method around it.
    needs_method = max(condition, variable, key=lambda code: "self." in code)
    before, names = code_before(rng, split, needs_method)
    return before + condition.format(**names), before + variable.format(**names), names
