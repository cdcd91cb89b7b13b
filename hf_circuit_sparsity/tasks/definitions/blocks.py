"""Tasks about the lines that open a block, and about what stands in it."""

import random

from .base import Example, Pair, Split, define
from .words import (
    CALLABLES,
    MANAGERS,
    OPENERS,
    PATHS,
    code_before,
    indentation,
    surround,
    with_answers,
)

_CALLS: dict[Split, tuple[str, ...]] = {
    "train": (
        "{f}({v}", "{f}({v}, {w}", "{v}.{f}({w}", "self.{f}({v}", "{module}.{f}({v}",
    ),
    "test": (
        "{f}({v}.{x}", "{f}(self.{attr}", "{f}({v}, {w}, {u}", "{v}.{f}({w}, {u}",
        "self.{x}.{f}({v}",
    ),
}  # fmt: skip


@define(
    "with_as",
    "`with call(x)` goes on with as, `if call(x)` with a colon. The bracket is glued to the colon "
    "and the line end, so the answers are the first tokens of ') as' and of '):\\n'.",
)
def with_as(rng: random.Random, split: Split) -> Pair:
    call = rng.choice(_CALLS[split])
    before, names = code_before(rng, split, call)
    call = call.format(**{**names, "f": MANAGERS.choice(rng, split)})
    return (
        Example(f"{before}with {call}", f") as {names['y']}:\n"),
        Example(f"{before}if {call}", "):\n"),
    )


# `open` as the head of a block, and elsewhere, with as many tokens.
_OPENINGS: dict[Split, tuple[tuple[str, str], ...]] = {
    "train": (
        ("with open(", "return open("),
        ("with {opener}.open(", "{x} = open("),
        ("with {opener}.open(", "{x}.{y} = open("),
    ),
    "test": (
        ("with open(", "yield open("),
        ("with {opener}.open(", "{x} = open("),
        ("with {opener}.open(", "self.{y} = open("),
    ),
}
_OPENED: dict[Split, tuple[str, ...]] = {
    "train": ("{path}", "{path}, {w}", "self.{path}", "{path}, encoding={w}", "{v}.{path}"),
    "test": (
        "{path}, {v}, {w}", "self.{path}, {w}", "{path} + {w}", "{path}, {v}, newline={w}",
        "{v}.{path}, {w}",
    ),
}  # fmt: skip


@define(
    "with_open",
    "`with open(path)` goes on with as, `return open(path)` and `f = open(path)` end the line. The "
    "bracket is glued to the line end: the answers are the first tokens of ') as' and of ')\\n'.",
)
def with_open(rng: random.Random, split: Split) -> Pair:
    block, plain = rng.choice(_OPENINGS[split])
    code = plain + rng.choice(_OPENED[split])
    before, names = code_before(rng, split, code)
    names |= {"path": PATHS.choice(rng, split), "opener": OPENERS.choice(rng, split)}
    with_block = before + (block + code.removeprefix(plain)).format(**names)
    return (
        Example(with_block, f") as {names['y']}:\n"),
        Example(before + code.format(**names), ")\n"),
    )


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


@define(
    "for_while",
    "`for x` goes on with in, `while x` with a colon. The answers are the first tokens of ' in' "
    "and of ':\\n'.",
)
def for_while(rng: random.Random, split: Split) -> Pair:
    before, names = code_before(rng, split, "for")
    variable = names[rng.choice("vx")]
    return (
        Example(f"{before}for {variable}", f" in {names['w']}:\n"),
        Example(f"{before}while {variable}", ":\n"),
    )


# The condition after `if`, and what `elif` goes on with: both begin with the same word.
_CHAINS: dict[Split, tuple[tuple[str, str], ...]] = {
    "train": (
        ("{v} == {digit}", "{v} == {w}"), ("{v} is None", "{v} > {digit}"), ("not {v}", "not {w}"),
        ("isinstance({v}, {cls})", "isinstance({v}, {base})"), ("{v}.{attr}", "{v}.{attr2}"),
    ),
    "test": (
        ("{v} < {digit}", "{v} < {w}"), ("{v} in {w}", "{v} in {y}"), ("{v} and {w}", "{v}"),
        ("callable({v})", "callable({w})"), ("{v}.{f}({w})", "{v}.{h}({w})"),
    ),
}  # fmt: skip
_BODIES: dict[Split, tuple[str, ...]] = {
    "train": ("{x} = {w}", "{g}({v})", "{x} += {digit}", "{x}.{y} = {v}"),
    "test": ("{v} = {x}", "{g}({x}, {w})", "pass", "{x} -= {digit}", "raise TypeError"),
}


@define(
    "else_elif",
    "`else` goes on with a colon, `elif` with a condition. The answers are the first tokens of "
    "':\\n' and of the word that the condition after `if` began with, such as ' isinstance'.",
)
def else_elif(rng: random.Random, split: Split) -> Pair:
    condition, other = rng.choice(_CHAINS[split])
    template, names = surround(rng, split, f"if {condition}:\n")
    names = with_answers(rng, split, names)
    indent = indentation(template.removesuffix("\n"))
    chain = (template + f"{indent}    {rng.choice(_BODIES[split])}\n{indent}").format(**names)
    return (
        Example(f"{chain}else", ":\n"),
        Example(f"{chain}elif", f" {other.format(**names)}:\n"),
    )


# The head of a block, and a plain line of as many tokens.
_LINES: dict[Split, tuple[tuple[str, str], ...]] = {
    "train": (
        ("for {x} in {v}:\n", "assert {x} in {v}\n"),
        ("for {x} in {v}:\n", "{f}({x}, {v})\n"),
        ("for {x} in {v}.{attr}:\n", "assert {x} in {v}.{attr}\n"),
        ("for {x} in {f}({v}):\n", "assert {x} in {f}({v})\n"),
        ("for {x}, {w} in {v}:\n", "{f}({x}, {w}, {v})\n"),
    ),
    "test": (
        ("for {x} in {v}.{w}.{y}:\n", "assert {x} in {v}.{w}.{y}\n"),
        ("for {x} in range({v}):\n", "assert {x} in range({v})\n"),
        ("for {x} in {f}({v}, {w}):\n", "assert {x} in {f}({v}, {w})\n"),
        ("for {x} in {v}.{f}({w}):\n", "assert {x} in {v}.{f}({w})\n"),
        ("for {x}, {w}, {y} in {v}:\n", "{f}({x}, {w}, {y}, {v})\n"),
    ),
}


@define(
    "indent_for",
    "After a for line the code goes one level deeper, after a plain line it stays. The answers are "
    "the white space of the next line, without the last space, which belongs to the next word.",
)
def indent_for(rng: random.Random, split: Split) -> Pair:
    # Inside a function: code that is not indented has no white space to ask for.
    before, names = code_before(rng, split, "return")
    indent = indentation(before)
    head, plain = (before + line.format(**names) for line in rng.choice(_LINES[split]))
    return (
        Example(head, f"{indent}    {names['u']} = {names['v']}\n"),
        Example(plain, f"{indent}{names['u']} = {names['v']}\n"),
    )


# What stands before, the heads of a class and of a decorator, and what stands between and `def`.
_BEFORE: dict[Split, tuple[str, ...]] = {
    "train": ("", "import {module}\n\n\n", "{u} = {digit}\n\n\n", "@{g}\n"),
    "test": ("from {module} import {g}\n\n\n", "{u} = None\n\n\n", "@{g}({u})\n", "{g}()\n\n\n"),
}
_HEADS: dict[Split, tuple[tuple[str, str], ...]] = {
    "train": (
        ("class {cls}:\n", "def {f}():\n"),
        ("class {cls}({base}):\n", "def {f}({func}):\n"),
    ),
    "test": (
        ("class {cls}({base}, {other}):\n", "def {f}({func}, {v}=None):\n"),
        ("class {cls}({module}.{base}):\n", "def {f}({func}, *{v}):\n"),
    ),
}
_BETWEEN: dict[Split, tuple[str, ...]] = {
    "train": ("", "    {x} = {digit}\n\n", "    {x} = {h}({w})\n\n", "    {x} = {y} = None\n\n"),
    "test": ("", "    {x} = True\n\n", "    {x} = {y}.{w}\n\n", "    {x}, {y} = {h}()\n\n"),
}


@define(
    "class_init",
    "The first function in a class is __init__, the first in a decorator is called wrapper. The "
    "answers are the first tokens of the two names.",
)
def class_init(rng: random.Random, split: Split) -> Pair:
    _, names = code_before(rng, split)
    names |= {"func": CALLABLES.choice(rng, split), "other": names["base"] + "Base"}
    before, between = rng.choice(_BEFORE[split]), rng.choice(_BETWEEN[split])
    in_class, in_function = (
        f"{before}{head}{between}    def".format(**names) for head in rng.choice(_HEADS[split])
    )
    return Example(in_class, " __init__(self):\n"), Example(in_function, " wrapper(*args):\n")
