"""A behaviour as pairs of prompts and two tokens to decide between."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from datasets import Dataset, DatasetDict, Features, List, Value
from huggingface_hub import CommitInfo
from transformers import PreTrainedTokenizerBase

from .definitions.base import Example, Split
from .encoding import EncodedPair, check_expressible, encode_pairs, pad_left
from .task_repository import push_task, read_task, table_of_dataset
from .text import TaskText, check_task_name, read_csv, text_of_table

FEATURES = Features(
    {
        "prompt": Value("string"),
        "counterfactual_prompt": Value("string"),
        "target": Value("string"),
        "counterfactual_target": Value("string"),
        "input_ids": List(Value("int32")),
        "counterfactual_input_ids": List(Value("int32")),
        "target_id": Value("int32"),
        "counterfactual_target_id": Value("int32"),
    }
)


class TaskTooLongError(ValueError):
    """A prompt of the task has more tokens than the model can take."""


@dataclass(frozen=True)
class BinaryTask:
    """A binary next-token task: after `prompt`, `target` is right and `counterfactual_target` not.

    Attributes:
        name: the task's name.
        description: one or two sentences for cards and reports.
        train: rows to find a circuit with.
        test: rows to check it with; the built-in tasks share no template and no name with `train`.
        tokenizer: the one that made the rows.
        text: for a task of one's own, the pairs it was made of; None for a built-in one.

    Both datasets have the columns

    - `prompt`, `counterfactual_prompt` (string): two prompts that differ in what decides the
      answer. Rows 2k and 2k+1 are one pair, in both directions, so both answers are equally
      frequent, and each row alone is a complete example.
    - `target`, `counterfactual_target` (string): the right next token of each of the two prompts.
    - `input_ids`, `counterfactual_input_ids` (lists of int32): the tokens of the prompts, without
      special tokens. The two are equally long wherever `equal_length` says so.
    - `target_id`, `counterfactual_target_id` (int32).
    """

    name: str
    description: str
    train: Dataset
    test: Dataset
    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    text: TaskText | None = field(default=None, repr=False)
    _tensors: dict[str, dict[str, torch.Tensor]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @classmethod
    def from_pairs(
        cls,
        name: str,
        tokenizer: PreTrainedTokenizerBase,
        train_pairs: Iterable[tuple[tuple[str, str], tuple[str, str]]],
        test_pairs: Iterable[tuple[tuple[str, str], tuple[str, str]]],
        *,
        description: str = "",
        max_length: int | None = None,
    ) -> "BinaryTask":
        """A task of one's own.

        Args:
            name: letters, digits, "_", "-" and "."; not that of a built-in task.
            tokenizer: the model's tokenizer.
            train_pairs: pairs `((prompt, target), (counterfactual_prompt, counterfactual_target))`,
                each used in both directions.
            test_pairs: the same, for the test split.
            description: for cards and reports.
            max_length: the longest prompt allowed, in tokens.

        Raises:
            TaskNotExpressibleError: a target is not exactly one token after its prompt, or the two
                targets of a pair are the same token.
            ValueError: no pairs, or an empty prompt.
            TaskTooLongError: (a `ValueError`) A prompt longer than `max_length`.
        """
        check_task_name(name)
        splits = []
        for split, given in (("train", train_pairs), ("test", test_pairs)):
            pairs = tuple((Example(*first), Example(*second)) for first, second in given)
            if not pairs:
                raise ValueError(f"Task {name!r}: the {split} split has no pairs; pass some.")
            splits.append(pairs)
        return cls.from_text(TaskText(name, description, *splits), tokenizer, max_length=max_length)

    @classmethod
    def from_dataset(
        cls,
        dataset: Dataset | DatasetDict,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        *,
        description: str = "",
        test_fraction: float = 0.2,
        seed: int = 0,
        max_length: int | None = None,
        equal_length: bool = False,
    ) -> "BinaryTask":
        """A task of one's own from a table.

        Each row is a pair: `prompt`, `target`, `counterfactual_prompt` and `counterfactual_target`,
        strings. It is used in both directions, and a row that is there already, or its mirror
        image, is left out. Other columns are ignored, but for two that say what is held out:

        - `split`: "train" or "test", of every row.
        - `template`: rows with the same one stay together; where no `split` is given, some
          templates are held out at random. Without either, some pairs are.

        No prompt and no template may be in both splits.

        Args:
            dataset: with the columns above; of a `DatasetDict` its `train` and `test`.
            tokenizer: the model's.
            name: letters, digits, "_", "-" and "."; not that of a built-in task.
            description: one line, for cards and reports.
            test_fraction: share of templates or pairs to hold out at random.
            seed: of that choice.
            max_length: the longest prompt allowed, in tokens.
            equal_length: whether both prompts of every pair must have as many tokens, which
                interchange and steering need.

        Raises:
            TaskNotExpressibleError: (a `ValueError`) An answer is not exactly one token after its
                prompt; names the row.
            TaskTooLongError: (a `ValueError`) A prompt longer than `max_length`.
            ValueError: missing columns, an empty value, answers or prompts that are the same,
                too few rows, prompts of unequal length; names the row.
        """
        splits = table_of_dataset(dataset, name)
        text = text_of_table(name, splits, description, test_fraction=test_fraction, seed=seed)
        return cls.from_text(text, tokenizer, max_length=max_length, equal_length=equal_length)

    @classmethod
    def from_csv(
        cls,
        path: str | os.PathLike,
        tokenizer: PreTrainedTokenizerBase,
        name: str | None = None,
        *,
        description: str = "",
        test_fraction: float = 0.2,
        seed: int = 0,
        max_length: int | None = None,
        equal_length: bool = False,
    ) -> "BinaryTask":
        """A task of one's own from a CSV file: UTF-8, commas, a header.

        Args:
            path: of the file, with the columns of [`BinaryTask.from_dataset`].
            tokenizer: the model's.
            name: that of the file if not given.
            description, test_fraction, seed, max_length, equal_length: as there.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: as there; names the row and the line.
        """
        text = text_of_table(
            Path(path).stem if name is None else name, {"all": read_csv(path)}, description,
            test_fraction=test_fraction, seed=seed,
        )  # fmt: skip
        return cls.from_text(text, tokenizer, max_length=max_length, equal_length=equal_length)

    @classmethod
    def from_text(
        cls,
        text: TaskText,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int | None = None,
        equal_length: bool = False,
    ) -> "BinaryTask":
        """A task of one's own under a tokenizer; see [`BinaryTask.from_dataset`]."""
        splits = []
        for pairs in (text.train, text.test):
            encoded = encode_pairs(tokenizer, pairs)
            for pair, sides in zip(pairs, encoded, strict=True):
                row = text.rows.get(pair, "")
                check_expressible(text.name, tokenizer, sides, single_tokens=True, row=row)
                if equal_length and not sides.is_equal_length:
                    counts = " and ".join(str(len(side.input_ids)) for side in sides)
                    raise ValueError(
                        f"Task {text.name!r}, {row}: the prompts have {counts} tokens under this "
                        "tokenizer, but equal_length=True was passed; make them equally long."
                    )
            splits.append(encoded)
        return cls.from_encoded(
            text.name, text.description, tokenizer, *splits, max_length=max_length, text=text
        )

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Write a task of one's own into a folder: `task.json`, its pairs as text.

        Raises:
            ValueError: it is a built-in task, which name and seed are enough for.
        """
        if self.text is None:
            raise ValueError(
                f"{self.name!r} is a built-in task, which need not be saved; load_task makes it."
            )
        self.text.save(save_directory)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike,
        tokenizer: PreTrainedTokenizerBase,
        *,
        config_name: str | None = None,
        name: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        max_length: int | None = None,
    ) -> "BinaryTask":
        """Read a task of one's own from a folder or from a dataset on the Hub.

        Args:
            name_or_path: folder that [`BinaryTask.save_pretrained`] wrote or that holds the circuit
                of such a task; else a folder or `user/name` that `datasets.load_dataset` reads,
                with the columns of [`BinaryTask.from_dataset`].
            tokenizer: the model's.
            config_name: which of several in a dataset.
            name: of the task; what is stored or `config_name` if not given.
            revision: branch, tag or commit hash on the Hub.
            token: access token; the saved one if not given, none if False.
            cache_dir: where downloads are kept; the usual cache if not given.
            max_length: the longest prompt allowed, in tokens.

        Raises:
            FileNotFoundError: there is no such folder or dataset.
            ValueError: several tasks and no `config_name`, a damaged file, or a table that
                [`BinaryTask.from_dataset`] refuses.
        """
        text = read_task(
            name_or_path, config_name, name, revision=revision, token=token, cache_dir=cache_dir
        )
        return cls.from_text(text, tokenizer, max_length=max_length)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = True,
        revision: str | None = None,
        token: str | bool | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
    ) -> CommitInfo:
        """Upload the task to the Hub: a configuration, named as the task, of a dataset.

        Others load it by `load_task("user/name:task", tokenizer)`, and as a table by
        `load_dataset("user/name", "task")`. A dataset may hold several tasks; its card names them,
        and a card that a person wrote keeps its text.

        Args:
            repo_id: `user/name`; made if it is not there.
            private: whether a new repository is private.
            revision: branch to write to.
            token: access token; the saved one if not given.
            commit_message: of the one commit made.
            create_pr: open a pull request with the commit instead of writing to the branch.

        Raises:
            HfHubHTTPError: (an `OSError`) nobody is signed in, or there is no right to write.
        """
        return push_task(
            self.name, self.description, DatasetDict({"train": self.train, "test": self.test}),
            repo_id, built_in=self.text is None, private=private, revision=revision, token=token,
            create_pr=create_pr, commit_message=commit_message or f"Upload the task {self.name}",
        )  # fmt: skip

    @classmethod
    def from_encoded(
        cls,
        name: str,
        description: str,
        tokenizer: PreTrainedTokenizerBase,
        train: Sequence[EncodedPair],
        test: Sequence[EncodedPair],
        *,
        max_length: int | None = None,
        text: TaskText | None = None,
    ) -> "BinaryTask":
        """A task of pairs that `encode_pairs` made and the caller has checked.

        Raises:
            TaskTooLongError: (a `ValueError`) A prompt longer than `max_length` tokens.
        """
        if max_length is not None:
            sides = [side for pair in (*train, *test) for side in pair]
            longest = max(sides, key=lambda side: len(side.input_ids))
            if len(longest.input_ids) > max_length:
                raise TaskTooLongError(
                    f"Task {name!r}: the prompt {longest.prompt!r} is {len(longest.input_ids)} "
                    f"tokens long under this tokenizer, but max_length is {max_length}; use a "
                    "model with a longer context or a tokenizer with longer tokens."
                )
        splits = (_rows(tokenizer, train), _rows(tokenizer, test))
        return cls(name, description, *splits, tokenizer, text)

    @property
    def pad_token_id(self) -> int:
        """What `tensors` pads with: the tokenizer's padding token, or 0 where it has none."""
        pad = self.tokenizer.pad_token_id
        return 0 if pad is None else pad

    @cached_property
    def longest_prompt(self) -> int:
        """Tokens of the longest prompt of both splits."""
        columns = ("input_ids", "counterfactual_input_ids")
        return max(
            len(ids) for split in (self.train, self.test) for name in columns for ids in split[name]
        )

    @property
    def equal_length(self) -> bool:
        """Whether every prompt has as many tokens as its counterfactual, in both splits."""
        columns = ("input_ids", "counterfactual_input_ids")
        return all(
            list(map(len, split[columns[0]])) == list(map(len, split[columns[1]]))
            for split in (self.train, self.test)
        )

    def tensors(self, split: Split) -> dict[str, torch.Tensor]:
        """The whole split as tensors for a model, made once; do not change them in place.

        Prompts are padded on the left, so `logits[:, -1]` is always the answer's position. All
        tensors are int64 on the CPU; with n rows whose longest prompt has L tokens:

        - `input_ids`, `attention_mask`: [n, L]
        - `counterfactual_input_ids`, `counterfactual_attention_mask`: [n, L]
        - `target_ids`, `counterfactual_target_ids`: [n]

        Raises:
            ValueError: a split other than "train" and "test".
        """
        if split not in ("train", "test"):
            raise ValueError(f'The split is {split!r}, but must be "train" or "test".')
        if split not in self._tensors:
            self._tensors[split] = self._padded(getattr(self, split))
        return dict(self._tensors[split])

    def _padded(self, dataset: Dataset) -> dict[str, torch.Tensor]:
        rows = dataset[:]
        length = max(map(len, rows["input_ids"] + rows["counterfactual_input_ids"]))
        tensors = {}
        for side in ("", "counterfactual_"):
            ids, mask = pad_left(rows[f"{side}input_ids"], length, self.pad_token_id)
            tensors |= {f"{side}input_ids": ids, f"{side}attention_mask": mask}
            tensors[f"{side}target_ids"] = torch.tensor(rows[f"{side}target_id"])
        return tensors


def _rows(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[EncodedPair]) -> Dataset:
    rows = []
    for first, second in pairs:
        for side, other in ((first, second), (second, first)):
            target, other_target = side.continuation_ids[0], other.continuation_ids[0]
            texts = [
                # As it was written: decoding may add or drop a space.
                one.continuation
                if len(one.continuation_ids) == 1
                else tokenizer.decode(one.continuation_ids[:1])
                for one in (side, other)
            ]
            ids = side.input_ids, other.input_ids
            rows.append((side.prompt, other.prompt, *texts, *ids, target, other_target))
    return Dataset.from_list(
        [dict(zip(FEATURES, row, strict=True)) for row in rows], features=FEATURES
    )
