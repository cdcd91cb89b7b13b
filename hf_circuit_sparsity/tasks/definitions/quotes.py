"""Tasks about string literals."""

import random

from .base import Example, Pair, Split, define
from .words import WORDS, more_names, surround

# Code up to the end of an open string. In each of these the string can be followed by an operator
# (` +`, ` %`, ` in`), and so by a space: then the closing quote is a token of its own. Before a
# bracket or a line end it would be glued to it (`")\n` is one token).
_TEMPLATES: dict[Split, tuple[str, ...]] = {
    "train": (
        "{v} = {quote}{text}", "return {quote}{text}", "if {v} == {quote}{text}",
        "print({quote}{text}", "raise ValueError({quote}{text}", "self.{attr} = {quote}{text}",
        "{v}.{f}({quote}{text}", "{v} = {w} or {quote}{text}", "{f}({w}, {quote}{text}",
        "{v} = {w}.{f}({v}, {quote}{text}", "{v}.{attr} += {quote}{text}", "{v} = [{quote}{text}",
        "{w} = {f}({v}={quote}{text}",
    ),
    "test": (
        "{v} += {quote}{text}", "yield {quote}{text}", "while {v} != {quote}{text}",
        "assert {quote}{text}", "raise TypeError({quote}{text}", "{v} = {f}({quote}{text}",
        "self.{f}({w}, {quote}{text}", "{v} = {w} + {quote}{text}",
    ),
}  # fmt: skip
# How words become the content of a string; each ends in a letter.
_CONTENTS: dict[Split, tuple[str, ...]] = {
    "train": (
        "{0}", "{0} {1}", "{0} {1} {2}", "{0} {1} {2} {3}", "{0} %s", "{0}: {1}", "{0}.{1}",
        "{0}-{1}", "{0}, {1} {2}", "{0} %d {1}", "{0}_{1}_{2}", "{0}/{1}/{2}", "{0} {1}: %s {2}",
        "{0} {1} {2} {3} {1} {2}",
    ),
    "test": (
        "{0}, {1}", "{0} {1} %d", "{0}_{1}", "{0}/{1}", "%s {0} {1}", "{0} {1} {2} {3} {0}",
        "{0} {1}, {2} {3}",
    ),
}  # fmt: skip


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


# Code up to an f-string, and what closes it behind the string.
_F_STRINGS: dict[Split, tuple[tuple[str, str], ...]] = {
    "train": (
        ("print(", ")"), ("raise ValueError(", ")"), ("{v} = ", ""), ("return ", ""),
        ("{v}.{f}(", ")"),
    ),
    "test": (
        ("self.{attr} = ", ""), ("raise TypeError(", ")"), ("{v} += ", ""), ("yield ", ""),
        ("{v} = {f}({w}, ", ")"),
    ),
}  # fmt: skip
# The text up to what is open, and the text behind it. One field is always there: without any, the
# string would need no f.
_FORMATTED: dict[Split, tuple[tuple[str, str], ...]] = {
    "train": (
        ("{0} {{{x}}} {1} {open}", "{2}"), ("{0} {open}", "{1} {{{x}}}"),
        ("{0} {1} {open}", "{{{x}}}"), ("{{{x}}}: {0} {open}", "{1} {2}"),
        ("{0} {{{x}.{y}}} {1} {2} {open}", "{3}"),
    ),
    "test": (
        ("{{{x}}} {0} {open}", "{1} {2}"), ("{0}, {1} {open}", "{{{x}}} {2}"),
        ("{0} {1} {2} {open}", "{3} {{{x}}}"), ("{0} ({1}) {{{x}}} {open}", "{2}"),
        ("{{{x}.{y}}} {0}, {1} {open}", "{2} {3}"),
    ),
}  # fmt: skip


@define(
    "fstring_brace",
    "Inside an f-string, close a field with } and a remark in brackets with ).",
)
def fstring_brace(rng: random.Random, split: Split) -> Pair:
    head, close = rng.choice(_F_STRINGS[split])
    template, names = surround(rng, split, head)
    names = more_names(rng, split, names)
    before, after = rng.choice(_FORMATTED[split])
    words = WORDS.sample(rng, split, 4)
    inner = rng.choice(("{u}", "{u}", "{u}.{y}")).format(**names)
    quote = rng.choice("'\"")
    prompts = [
        template.format(**names)
        + f"f{quote}"
        + before.format(*words, **names, open=opening)
        + inner
        for opening in "{("
    ]
    rest = f" {after.format(*words, **names)}{quote}{close}\n"
    return Example(prompts[0], "}" + rest), Example(prompts[1], ")" + rest)
