"""Tasks in which a variable's first value decides what can be done with it."""

import random

from .base import Example, Pair, Split, define
from .words import code_before

# Code up to a variable that a new element is about to go into.
_TEMPLATES: dict[Split, tuple[str, ...]] = {
    "train": (
        "{v} = {init}\nfor {u} in {w}:\n    {v}",
        "{v} = {init}\nfor {u} in {f}({w}):\n    if {u}.{attr}:\n        {v}",
        "{v} = {init}\n{x} = 0\nfor {u} in {f}():\n    {g}({u}, {x})\n    {v}",
        "{v} = {init}\nwhile {w}:\n    {u} = {w}.{g}()\n    {v}",
        "import {module}\n\n{v} = {init}\n{u} = {module}.{f}({w})\n{v}",
        "def {f}({w}):\n    {v} = {init}\n    for {u} in {w}:\n        {v}",
        "def {f}({u}, {w}):\n    {v} = {init}\n    if {u} == {w}:\n        {v}",
        "    def {f}(self, {w}):\n        {v} = {init}\n        for {u} in {w}:\n            {v}",
        "    def {f}(self, {u}):\n        {v} = {init}\n        self.{attr} = {u}\n        {v}",
    ),
    "test": (
        "{v} = {init}\nif {u} is not None:\n    {v}",
        "{v} = {init}\nfor {w}, {u} in {f}():\n    if {w}:\n        {v}",
        "{v} = {init}\nwith {f}({w}) as {u}:\n    {v}",
        "from {module} import {f}\n\n{v} = {init}\nif {f}({w}):\n    {u} = {w}\n    {v}",
        "def {f}():\n    {v} = {init}\n    for {u} in range({w}):\n        {g}({u})\n        {v}",
        "def {f}({w}, {u}):\n    {v} = {init}\n    if {u} not in {w}:\n        {v}",
        "class {cls}:\n    def {f}(self, {u}):\n        {v} = {init}\n        if {u} > 0:\n"
        "            {v}",
        "    def {f}(self):\n        {v} = {init}\n        {u} = self.{attr}\n        {v}",
    ),
}


@define(
    "set_or_string",
    "A variable that began as set() is added to with .add, one that began as an empty string "
    "with +=.",
)
def set_or_string(rng: random.Random, split: Split) -> Pair:
    return _pair(rng, split, _names(rng, split))


@define(
    "set_or_string_fixedvarname",
    "A variable that began as set() is added to with .add, one that began as an empty string "
    "with +=. The variable is always called `current`.",
)
def set_or_string_fixedvarname(rng: random.Random, split: Split) -> Pair:
    names = _names(rng, split)
    while "current" in names.values():
        names = _names(rng, split)
    return _pair(rng, split, {**names, "v": "current"})


def _names(rng: random.Random, split: Split) -> dict[str, str]:
    return code_before(rng, split)[1]


def _pair(rng: random.Random, split: Split, names: dict[str, str]) -> Pair:
    template = rng.choice(_TEMPLATES[split])
    a_set = template.format(**names, init="set()")
    a_string = template.format(**names, init=rng.choice(("''", '""')))
    return Example(a_set, f".add({names['u']})\n"), Example(a_string, f" += {names['u']}\n")
