"""Tasks by name under a tokenizer: the built-in ones, and those of one's own."""

import difflib
import random
import re
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

from datasets import DatasetDict
from transformers import PreTrainedTokenizerBase

from .binary_task import BinaryTask
from .definitions.base import DEFINITIONS, Language, Split, TaskDefinition
from .encoding import EncodedPair, TaskNotExpressibleError, check_expressible, encode_pairs
from .task_repository import read_task
from .text import TaskText, read_csv, text_of_table


def list_tasks(language: Language | None = None) -> list[str]:
    """The names of the built-in tasks, in alphabetical order.

    Args:
        language: "python" for the twenty on code, "english" for the five on text; all if not given.

    Raises:
        ValueError: another language.
    """
    names = sorted(n for n, d in DEFINITIONS.items() if language in (None, d.language))
    if not names:
        raise ValueError(f"language={language!r} was passed, but no built-in task is in it.")
    return names


def check_tasks(names: Iterable[str]) -> None:
    """Raise unless [`load_task`] knows all these names and can read what they stand for.

    It needs no tokenizer, so that nobody loads a model for a task that is not there.

    Raises:
        ValueError, OSError: as [`load_task`], but for what only a tokenizer tells.
    """
    for name in names:
        if name not in DEFINITIONS:
            _own_text(name)


def load_task(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    n_train: int = 2000,
    n_test: int = 512,
    seed: int = 0,
    max_length: int | None = None,
) -> BinaryTask:
    """A task for a tokenizer: a built-in one, which is generated, or one's own, which is read.

    A task of one's own is `file.csv`, a folder or `user/tasks` on the Hub, the last two with
    `:name` where they hold several; see [`BinaryTask.from_csv`] and [`BinaryTask.from_pretrained`].
    It has the rows it has, the first `n_train` and `n_test` of them at most.

    In a built-in task the answer to a prompt is the first token of what follows it, tokenized
    together with the prompt: what a model that has read such text through this tokenizer would see
    there. Prompts have as many tokens as their counterfactuals, unless fewer than one pair in
    twelve offers that under this tokenizer (`BinaryTask.equal_length` tells). No prompt occurs
    twice. The same arguments always give the same rows, and a larger `n_train` or `n_test` only
    adds to them.

    Args:
        name: one of `list_tasks()`, a CSV file, a folder or a dataset on the Hub.
        tokenizer: the model's tokenizer.
        n_train: rows of the train split; an even number, as every pair gives two rows.
        n_test: rows of the test split; an even number.
        seed: another seed, other rows, or another split of a table that has none.
        max_length: the longest prompt that the model can take, in tokens.

    Raises:
        ValueError: an unknown task, a table that [`BinaryTask.from_dataset`] refuses, an odd or
            non-positive number of rows, or more rows than a built-in task has.
        TaskTooLongError: (a `ValueError`) A prompt longer than `max_length`.
        TaskNotExpressibleError: (a `ValueError`) The two answers are not different single tokens
            under this tokenizer.
    """
    for argument, rows in (("n_train", n_train), ("n_test", n_test)):
        if rows < 2 or rows % 2:
            raise ValueError(
                f"{argument} is {rows}, but must be a positive even number: every pair of prompts "
                "gives two rows."
            )
    if name not in DEFINITIONS:
        text = _own_text(name, seed).first(n_train // 2, n_test // 2)
        return BinaryTask.from_text(text, tokenizer, max_length=max_length)
    definition = DEFINITIONS[name]
    train = _draw(definition, tokenizer, "train", n_train // 2, seed)
    test = _draw(definition, tokenizer, "test", n_test // 2, seed)
    return BinaryTask.from_encoded(
        name, definition.description, tokenizer, train, test, max_length=max_length
    )


def build_task_datasets(
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str] | None = None,
    *,
    n_train: int = 2000,
    n_test: int = 512,
    seed: int = 0,
) -> dict[str, DatasetDict]:
    """Tasks as plain datasets, to share on the Hub: name to a `DatasetDict` of `train` and `test`.

    Args:
        tokenizer: the tokenizer for the columns of token ids.
        names: the tasks, as for `load_task`. Default: every built-in task on Python that the
            tokenizer can express, with a warning for each of the others.
        n_train, n_test, seed: as in `load_task`.

    Raises:
        ValueError: as `load_task`, for any of `names`.
    """
    tasks = {}
    for name in list_tasks("python") if names is None else names:
        try:
            task = load_task(name, tokenizer, n_train=n_train, n_test=n_test, seed=seed)
        except TaskNotExpressibleError as error:
            if names is not None:
                raise
            warnings.warn(f"Left out: {error}", stacklevel=2)
            continue
        tasks[task.name] = DatasetDict({"train": task.train, "test": task.test})
    return tasks


def _own_text(name: str, seed: int = 0) -> TaskText:
    """The text of a task that is not built in, from wherever its name leads."""
    path = Path(name)
    if path.suffix.lower() == ".csv":
        return text_of_table(path.stem, {"all": read_csv(path)}, seed=seed)
    source, colon, config_name = name.rpartition(":")
    if not colon or path.is_dir():
        source, config_name = name, None
    if source and (Path(source).is_dir() or re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source)):
        return read_task(source, config_name, seed=seed)
    close = difflib.get_close_matches(name, DEFINITIONS, n=1)
    one_of = ", ".join(list_tasks())
    hint = f"did you mean {close[0]!r}?" if close else f"choose from {one_of}."
    raise ValueError(
        f"There is no task {name!r}; {hint} A CSV file, a folder and user/tasks:name are tasks too."
    )


def _draw(
    definition: TaskDefinition,
    tokenizer: PreTrainedTokenizerBase,
    split: Split,
    n_pairs: int,
    seed: int,
) -> list[EncodedPair]:
    """The first `n_pairs` usable pairs of the generator's stream."""
    rng = random.Random(f"{definition.name}/{split}/{seed}")
    usable: list[EncodedPair] = []
    seen: set[str] = set()
    # Tokenizing many at once is fast. The first batch has a fixed size because it decides, below,
    # whether pairs of equal length are common enough, which must not depend on how many rows are
    # asked for.
    equal_only = False
    for batch in range(8 + n_pairs // 16):
        fresh = []
        for _ in range(256):
            pair = definition.generate(rng, split)
            prompts = {example.prompt for example in pair}
            if seen.isdisjoint(prompts):
                seen |= prompts
                fresh.append(pair)
        if not fresh:
            break
        encoded = encode_pairs(tokenizer, fresh, equal_only=equal_only)
        expressible = [pair for pair in encoded if pair.is_expressible]
        if batch == 0:
            if not expressible:
                check_expressible(definition.name, tokenizer, encoded[0])
            equal = [pair for pair in expressible if pair.is_equal_length]
            # The batches allowed, above, are enough for a sixteenth of the pairs.
            equal_only = len(equal) >= len(fresh) / 12
            expressible = equal if equal_only else expressible
        usable += expressible
        if len(usable) >= n_pairs:
            return usable[:n_pairs]
    raise ValueError(
        f"Task {definition.name!r} has only {2 * len(usable)} different {split} rows under this "
        f"tokenizer, but {2 * n_pairs} were asked for; ask for fewer."
    )
