"""The names, words and surroundings that the tasks draw from, apart for train and test.

No entry of a train list may appear in any test list (a test checks it), and nothing here holds a
quote or a square bracket, so that the code around a prompt never decides the answer.
"""

import random
from typing import NamedTuple

from .base import Split


class Bank(NamedTuple):
    """Entries for the train split and others for the test split."""

    train: tuple[str, ...]
    test: tuple[str, ...]

    def sample(self, rng: random.Random, split: Split, count: int) -> list[str]:
        """`count` different entries of one split."""
        return rng.sample(getattr(self, split), count)

    def choice(self, rng: random.Random, split: Split) -> str:
        """One entry of one split."""
        return rng.choice(getattr(self, split))


def _entries(text: str) -> tuple[str, ...]:
    return tuple(text.split())


VARIABLES = Bank(
    train=_entries(
        "value result name data item key text line path size count index node other msg args obj "
        "cls file state start end total current first last left right src dst parent child buf "
        "mode flags level width height offset length options config params items keys values "
        "lines names nodes files rows cols x y z n i k p s t v a b"
    ),
    test=_entries(
        "entry record token target source label title header body prefix suffix status response "
        "request cache queue stack limit delay timeout counter number amount price score weight "
        "factor step origin parts words tokens fields entries records labels c d e f g m q r u w"
    ),
)

FUNCTIONS = Bank(
    train=_entries(
        "get set load save read write parse build check update find create make open_file "
        "close_all run start_up init_state add_item remove append_line get_value set_name "
        "read_line is_valid to_string copy_from next_item handle process"
    ),
    test=_entries(
        "fetch store scan emit render compile_all verify refresh search_for collect merge split_up "
        "connect send receive flush reset dispatch lookup resolve convert has_more as_dict "
        "prepare"
    ),
)

ATTRIBUTES = Bank(
    train=_entries(
        "_name _value _data _state _lock _path _file _args _type base root kind lineno encoding "
        "errors stream handler"
    ),
    test=_entries(
        "_code _size _text _list _map _line _info _pos owner engine charset method address port "
        "filename"
    ),
)

CLASSES = Bank(
    train=_entries(
        "Node Parser Reader Handler Stream Message Buffer Context Config Client Element Base Test "
        "Options Event"
    ),
    test=_entries(
        "Server Writer Token Request Response Error Manager Formatter Record Loader Session Frame "
        "Widget Process"
    ),
)

MODULES = Bank(
    train=("os", "sys", "re", "io", "json", "time", "types", "struct", "random", "logging"),
    test=("math", "socket", "string", "shutil", "signal", "errno", "copy", "pickle", "codecs"),
)

# What stands inside string literals. Lower-case words of letters only: what follows the last one
# then starts a token of its own.
WORDS = Bank(
    train=_entries(
        "hello world not found invalid argument expected got the from with and for to of in is "
        "are was must be have an unknown option type error while reading too many few missing "
        "required bytes object integer format codec utf ascii win linux default true false "
        "none yes no on off red blue green north south user group admin root host path file "
        "name value key item line can cannot could help about usage version date time day "
        "content length"
    ),
    test=_entries(
        "bad request response server client connection closed refused reset by peer unable because "
        "at least most one two three only this that it has been already defined method class "
        "function module package import failed during loading saving open permission denied "
        "black white yellow up down center top bottom stop pause plain "
        "html xml table row column title label button menu window frame"
    ),
)

# Where code can stand, and what must surround it: a `return` needs a function, `self` a method.
_ANYWHERE, _IN_FUNCTION, _IN_METHOD = 0, 1, 2

_SURROUNDINGS: dict[Split, tuple[tuple[int, str], ...]] = {
    "train": (
        (_ANYWHERE, ""),
        (_ANYWHERE, "import {module}\n\n"),
        (_ANYWHERE, "{u} = {f}({w})\n"),
        (_ANYWHERE, "if {u}:\n    "),
        (_IN_FUNCTION, "def {f}({v}, {w}):\n    "),
        (_IN_FUNCTION, "def {f}({w}):\n    {v} = {g}({w})\n    "),
        (_IN_FUNCTION, "def {f}({v}, {w}={u}):\n    if {v} > 0:\n        "),
        (_IN_FUNCTION, "def {f}({v}, {w}):\n    {w}.{attr} = {v}\n    "),
        (_IN_METHOD, "    def {f}(self, {v}, {w}):\n        "),
        (_IN_METHOD, "class {cls}:\n    def {f}(self, {v}):\n        {w} = {v}.{attr}\n        "),
        (_IN_METHOD, "    def {f}(self, {w}):\n        {v} = self.{g}({w})\n        "),
    ),
    "test": (
        (_ANYWHERE, "from {module} import {u}\n\n"),
        (_ANYWHERE, "{u} = None\n"),
        (_ANYWHERE, "if {u} is not None:\n    "),
        (_ANYWHERE, "for {u} in {w}:\n    "),
        (_IN_FUNCTION, "def {f}():\n    {v} = {w} = 0\n    "),
        (_IN_FUNCTION, "def {f}({v}, *{w}):\n    if not {v}:\n        "),
        (_IN_FUNCTION, "def {f}({v}, {w}=None):\n    {g}({v})\n    "),
        (_IN_METHOD, "class {cls}({base}):\n\n    def {f}(self):\n        {v} = {w}\n        "),
        (_IN_METHOD, "    def {f}(self, {v}, {w}):\n        self.{attr} = {v}\n        "),
        (_IN_METHOD, "    def {f}(self, {v}):\n        {w} = self.{attr} + 1\n        "),
    ),
}


def surround(rng: random.Random, split: Split, code: str) -> tuple[str, dict[str, str]]:
    """Put random code before `code`, and draw the names that both may use.

    Args:
        code: A template for `str.format`. It decides what can stand around it: what starts with
            `return` or `yield` gets a function, what uses `self.` a method.

    Returns:
        The template with the code before it, and the fields to format it with: `u`, `v`, `w`
        (different variables), `f`, `g` (functions), `attr`, `cls`, `base` (classes), `module`.
    """
    needed = _ANYWHERE
    if code.startswith(("return", "yield")):
        needed = _IN_FUNCTION
    if "self." in code:
        needed = _IN_METHOD
    before = rng.choice([text for scope, text in _SURROUNDINGS[split] if scope >= needed])
    names = dict(zip("uvw", VARIABLES.sample(rng, split, 3), strict=True))
    names |= dict(zip("fg", FUNCTIONS.sample(rng, split, 2), strict=True))
    names |= dict(zip(("cls", "base"), CLASSES.sample(rng, split, 2), strict=True))
    names["attr"] = ATTRIBUTES.choice(rng, split)
    names["module"] = MODULES.choice(rng, split)
    return before + code, names
