"""Tasks of one's own as text, before any tokenizer: tables, CSV files and `task.json`.

What is wrong with a table is said in one sentence that names the row, before any work. Files may be
anybody's: they are read as UTF-8 text of bounded size, and nothing in them is code.
"""

import csv
import hashlib
import io
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..files import write_json
from .definitions.base import DEFINITIONS, Example, Pair, Split

COLUMNS = ("prompt", "target", "counterfactual_prompt", "counterfactual_target")
FILE_NAME = "task.json"
FORMAT_VERSION = 1
MAX_BYTES = 64 << 20
LONGEST_DESCRIPTION = 2000
SPLITS: tuple[Split, ...] = ("train", "test")

# Where a row stands, for errors, and its values by column.
Row = tuple[str, Mapping[str, Any]]


@dataclass(frozen=True)
class TaskText:
    """A task of one's own as text.

    Attributes:
        name: of the task.
        description: one or two sentences.
        train: pairs of prompts with their answers, to find a circuit with.
        test: pairs to check it with.
        rows: where in its table a pair stands, for errors.
    """

    name: str
    description: str
    train: tuple[Pair, ...]
    test: tuple[Pair, ...]
    rows: Mapping[Pair, str] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_task_name(self.name)
        description = self.description
        if len(description) > LONGEST_DESCRIPTION or not description.isprintable():
            raise ValueError(
                f"Task {self.name!r}: the description must be one line of at most "
                f"{LONGEST_DESCRIPTION} printable characters, but it is {description!r:.80}."
            )

    def first(self, train: int, test: int) -> "TaskText":
        """With at most so many pairs in the two splits."""
        return replace(self, train=self.train[:train], test=self.test[:test])

    def digest(self) -> str:
        """16 hexadecimal digits that another text has not."""
        text = json.dumps(self._content(), ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def save(self, folder: str | os.PathLike) -> None:
        """Write `task.json` into a folder."""
        write_json(Path(folder) / FILE_NAME, self._content())

    def _content(self) -> dict[str, Any]:
        def table(pairs: Sequence[Pair]) -> list[dict[str, str]]:
            return [dict(zip(COLUMNS, (*one, *other), strict=True)) for one, other in pairs]

        return {
            "format_version": FORMAT_VERSION, "name": self.name, "description": self.description,
            "train": table(self.train), "test": table(self.test),
        }  # fmt: skip


def check_task_name(name: str) -> None:
    """Raise a `ValueError` unless a task of one's own may have this name.

    It becomes the name of folders, also on the Hub.
    """
    if name in DEFINITIONS:
        raise ValueError(
            f"{name!r} is the name of a built-in task, so a task of one's own needs another; "
            "pass it as name=, or name the file so."
        )
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}", name):
        raise ValueError(
            f"A task cannot be named {name!r:.120}; use at most 96 letters, digits, '_', '-' and "
            "'.', the first of them no '.' or '-'."
        )


def text_of_table(
    name: str,
    splits: Mapping[str, Iterable[Row]],
    description: str = "",
    *,
    test_fraction: float = 0.2,
    seed: int = 0,
) -> TaskText:
    """Check the rows of a table, and make pairs of them.

    A row that is the mirror image or the same as one before it adds nothing and is left out.

    Args:
        name: of the task.
        splits: `train` and `test`, or a single one that is to be split: by the rows' `split` where
            they have it, else at random by `template`, else at random by pairs.
        description: one or two sentences.
        test_fraction: share of templates or pairs that become `test` in a random split.
        seed: of a random split.

    Raises:
        ValueError: a row or the whole table is not what it should be; names the row.
    """
    check_task_name(name)
    if not 0 < test_fraction < 1:
        raise ValueError(f"test_fraction={test_fraction} was passed, but must be in (0, 1).")
    if len(splits) == 1:
        (table,) = splits.values()
        splits = _split(name, list(table), test_fraction, seed)
    if missing := sorted(set(SPLITS) - set(splits)):
        raise ValueError(
            f"Task {name!r} has the splits {', '.join(sorted(splits))}, but not {missing[0]!r}; "
            "pass both, or one table to split."
        )
    pairs: dict[str, list[Pair]] = {}
    rows: dict[Pair, str] = {}
    seen: dict[tuple[str, str], str] = {}  # prompts and templates, and in which split they are
    for split in SPLITS:
        pairs[split] = []
        for label, row in splits[split]:
            pair = _pair(label, row)
            if pair[0].prompt == pair[1].prompt:
                raise ValueError(
                    f"{label}: both prompts are {pair[0].prompt!r:.80}; they must differ in what "
                    "decides the answer."
                )
            whatever = [("prompt", example.prompt) for example in pair]
            if row.get("template"):
                whatever.append(("template", str(row["template"])))
            for key in whatever:
                if seen.setdefault(key, split) != split:
                    raise ValueError(
                        f"{label}: the {key[0]} {key[1]!r:.80} is in both splits, but what a "
                        "circuit is checked with must be new to it; leave it out of one."
                    )
            if pair not in rows and pair[::-1] not in rows:
                rows[pair] = label
                pairs[split].append(pair)
        if not pairs[split]:
            raise ValueError(f"Task {name!r} has no rows in its {split} split; add some.")
    return TaskText(name, description, tuple(pairs["train"]), tuple(pairs["test"]), rows)


def check_columns(name: str, columns: Iterable[str]) -> None:
    """Raise a `ValueError` that names the columns a table of a task lacks."""
    columns = list(columns)
    if missing := [column for column in COLUMNS if column not in columns]:
        raise ValueError(
            f"{name} lacks the column(s) {', '.join(missing)}; it has "
            f"{', '.join(map(repr, columns))[:300] or 'none'}."
        )


def _split(name: str, table: list[Row], test_fraction: float, seed: int) -> dict[str, list[Row]]:
    if any(row.get("split") for _, row in table):
        splits: dict[str, list[Row]] = {split: [] for split in SPLITS}
        for label, row in table:
            if row.get("split") not in splits:
                raise ValueError(
                    f"{label}: the split is {row.get('split')!r:.80}, but must be 'train' or "
                    "'test'."
                )
            splits[row["split"]].append((label, row))
        return splits

    def group(label: str, row: Mapping[str, Any]) -> str:
        if row.get("template"):
            return str(row["template"])
        return min(example.prompt for example in _pair(label, row))

    groups = {group(*row) for row in table}
    if len(groups) < 2:
        raise ValueError(
            f"Task {name!r} has {len(table)} row(s) of {len(groups)} kind(s), but at least two "
            "are needed: some to find a circuit with, others to check it."
        )
    # By hash, so that a template keeps its split when others come and go.
    ranked = sorted(groups, key=lambda g: hashlib.sha256(f"{seed}:{g}".encode()).digest())
    held_out = set(ranked[: min(max(1, round(len(ranked) * test_fraction)), len(ranked) - 1)])
    return {
        "train": [row for row in table if group(*row) not in held_out],
        "test": [row for row in table if group(*row) in held_out],
    }


def _pair(label: str, row: Mapping[str, Any]) -> Pair:
    for column in COLUMNS:
        value = row.get(column)
        if not isinstance(value, str) or not value:
            raise ValueError(
                f"{label}: {column} is {value!r:.80}, but must be text of at least one character."
            )
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise ValueError(f"{label}: {column} is no valid Unicode.")
    prompt, target, other_prompt, other_target = (row[column] for column in COLUMNS)
    if target == other_target:
        raise ValueError(
            f"{label}: both answers are {target!r:.80}, so there is nothing to decide between."
        )
    return Example(prompt, target), Example(other_prompt, other_target)


def read_csv(path: str | os.PathLike) -> list[Row]:
    """The rows of a CSV file: UTF-8, commas, a header with the columns of a task.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is too large, not UTF-8, no table, empty, or lacks columns.
    """
    path = Path(path)
    text = _read_text(path)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[Row] = []
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise ValueError(f"{path} names a column twice: {', '.join(header)[:300]}.")
        check_columns(str(path), header)
        line = reader.line_num
        for values in reader:
            label = f"{path}, row {len(rows) + 1} (line {line + 1})"
            line = reader.line_num
            if not values:  # an empty line
                continue
            if len(values) != len(header):
                raise ValueError(
                    f"{label}: there are {len(values)} values for {len(header)} columns; put "
                    "quotes around values that hold commas."
                )
            rows.append((label, dict(zip(header, values, strict=True))))
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num} is not CSV ({error}).") from error
    if not rows:
        raise ValueError(f"{path} has no rows below its header; add some.")
    return rows


def read_task_text(folder: str | os.PathLike) -> TaskText:
    """The task in the `task.json` of a folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged; begins with the file's path.
    """
    path = Path(folder) / FILE_NAME
    text = _read_text(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); copy it again.") from error
    if not isinstance(content, dict) or content.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path} is no task of format_version {FORMAT_VERSION}; update the library or save the "
            "task anew."
        )
    name, description = content.get("name"), content.get("description")
    if not isinstance(name, str) or not isinstance(description, str):
        raise ValueError(f"{path}: name and description must be strings; copy it again.")
    pairs: dict[str, tuple[Pair, ...]] = {}
    rows: dict[Pair, str] = {}
    try:
        for split in SPLITS:
            table = content.get(split)
            if not isinstance(table, list) or not table:
                raise ValueError(f"{split} must be a list of rows, but it is {table!r:.60}.")
            labelled = [(f"{split}[{i}]", row) for i, row in enumerate(table)]
            for label, row in labelled:
                if not isinstance(row, dict):
                    raise ValueError(f"{label} must be an object, but it is {row!r:.60}.")
            pairs[split] = tuple(_pair(label, row) for label, row in labelled)
            rows |= {pair: label for (label, _), pair in zip(labelled, pairs[split], strict=True)}
        return TaskText(name, description, pairs["train"], pairs["test"], rows)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {str(path)!r} to read a task from.")
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"{path} is larger than {MAX_BYTES >> 20} MiB; pass fewer rows.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 (byte {error.start} cannot be read); save it as UTF-8."
        ) from None
