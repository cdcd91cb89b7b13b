"""The names, words and surroundings that the tasks draw from, apart for train and test.

No entry of a train list may appear in any test list (a test checks it), and nothing here holds a
quote or a square bracket, so that the code around a prompt never decides the answer.
"""

import random
from pathlib import Path
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


def _bank(train: str, test: str) -> Bank:
    return Bank(tuple(train.split()), tuple(test.split()))


VARIABLES = _bank(
    """value result name data item key text line path size count index node other msg args obj cls
    file state start end total current first last left right src dst parent child buf mode flags
    level width height offset length options config params items keys values lines names nodes
    files rows cols x y z n i k p s t v a b""",
    """entry record token target source label title header body prefix suffix status response
    request cache queue stack limit delay timeout counter number amount price score weight factor
    step origin parts words tokens fields entries records labels c d e f g m q r u w""",
)

FUNCTIONS = _bank(
    """get set load save read write parse build check update find create make open_file close_all
    run start_up init_state add_item remove append_line get_value set_name read_line is_valid
    to_string copy_from next_item handle process""",
    """fetch store scan emit render compile_all verify refresh search_for collect merge split_up
    connect send receive flush reset dispatch lookup resolve convert has_more as_dict prepare""",
)

ATTRIBUTES = _bank(
    """_name _value _data _state _lock _path _file _args _type base root kind lineno encoding
    errors stream handler""",
    """_code _size _text _list _map _line _info _pos owner engine charset method address port
    filename""",
)

CLASSES = _bank(
    """Node Parser Reader Handler Stream Message Buffer Context Config Client Element Base Test
    Options Event""",
    """Server Writer Token Request Response Error Manager Formatter Record Loader Session Frame
    Widget Process""",
)

MODULES = _bank(
    "os sys re io json time types struct random logging",
    "math socket string shutil signal errno copy pickle codecs",
)

# Names that are answers: behind a space they are one token under OpenAI's tokenizer and under the
# one that is trained on the standard library, or begin with one that tells them apart.
ANSWERS = _bank(
    "a b x y i k n p s t first last start end left parent child value key width",
    "c d e f g m r w j lo hi source target token number prefix header new old",
)

# Functions whose result is worth a `with` as well as an `if`.
MANAGERS = _bank(
    "open_file urlopen get_lock get_connection start_session load_page lock_path",
    "fetch connect open_socket acquire begin send_request new_cursor",
)

# Modules that have a function `open`.
OPENERS = _bank("io gzip lzma", "codecs tarfile bz2 wave")

# What is opened.
PATHS = _bank(
    "path file name src dst infile log_file file_path config_file data_path",
    "filename source target fname location outfile archive report manifest",
)

# What counts from zero.
INDICES = _bank("i k n index pos", "j m idx num")

# A decorator's argument.
CALLABLES = _bank("func fn callback fun meth", "function method wrapped coro decorated")

# What takes the rest of the arguments: after one star, and after two.
STARRED = _bank("args vals values items", "argv parts fields rest bits")
DOUBLE_STARRED = _bank("kwargs options params config", "kwds kws attrs defaults meta")

# What stands inside string literals: first for train, then for test. Lower-case words of letters
# only: what follows the last one then starts a token of its own.
WORDS = _bank(*Path(__file__).with_name("words.txt").read_text(encoding="utf-8").split("\n\n"))

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


def more_names(rng: random.Random, split: Split, names: dict[str, str]) -> dict[str, str]:
    """What `surround` drew, and more: `x`, `y` (variables), `h` (function), `attr2`, `digit`.

    Each is another name than those of its kind that `names` holds; `digit` is a small number.
    """
    used = set(names.values())
    x, y = [name for name in VARIABLES.sample(rng, split, 5) if name not in used][:2]
    h = next(name for name in FUNCTIONS.sample(rng, split, 3) if name not in used)
    attr2 = next(name for name in ATTRIBUTES.sample(rng, split, 2) if name not in used)
    return {**names, "x": x, "y": y, "h": h, "attr2": attr2, "digit": str(rng.randrange(10))}


def code_before(rng: random.Random, split: Split, code: str = "") -> tuple[str, dict[str, str]]:
    """What `surround` puts before `code`, formatted, and the names of `more_names`."""
    template, names = surround(rng, split, code)
    names = more_names(rng, split, names)
    return template.removesuffix(code).format(**names), names


def with_answers(rng: random.Random, split: Split, names: dict[str, str]) -> dict[str, str]:
    """As `more_names`, but `v` and `w`, which are to be answers, come from `ANSWERS`."""
    v, w = ANSWERS.sample(rng, split, 2)
    others = [name for name in VARIABLES.sample(rng, split, 6) if name not in (v, w)]
    u, x, y = others[:3]
    return {**more_names(rng, split, names), "u": u, "v": v, "w": w, "x": x, "y": y}


def indentation(template: str) -> str:
    """The white space that the last line of a text begins with."""
    line = template[template.rfind("\n") + 1 :]
    return line[: len(line) - len(line.lstrip(" "))]
