"""A behaviour as pairs of prompts and two tokens to decide between."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase

from .definitions.base import Example, Pair, Split

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


class TaskNotExpressibleError(ValueError):
    """The tokenizer has no single tokens that tell the task's two answers apart."""


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
            name: any name.
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
        splits = []
        for split, given in (("train", train_pairs), ("test", test_pairs)):
            pairs = [(Example(*first), Example(*second)) for first, second in given]
            if not pairs:
                raise ValueError(f"Task {name!r}: the {split} split has no pairs; pass some.")
            encoded = encode_pairs(tokenizer, pairs)
            for pair in encoded:
                check_expressible(name, tokenizer, pair, single_tokens=True)
            splits.append(encoded)
        return cls.from_encoded(name, description, tokenizer, *splits, max_length=max_length)

    @classmethod
    def from_encoded(
        cls,
        name: str,
        description: str,
        tokenizer: PreTrainedTokenizerBase,
        train: Sequence["EncodedPair"],
        test: Sequence["EncodedPair"],
        *,
        max_length: int | None = None,
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
        return cls(name, description, _rows(tokenizer, train), _rows(tokenizer, test), tokenizer)

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


def pad_left(
    sequences: Sequence[Sequence[int]], length: int | None = None, pad_token_id: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask `(n, length)`, int64, of sequences padded on the left.

    Args:
        sequences: token ids, of any lengths.
        length: the longest sequence's if not given.
        pad_token_id: what stands before the shorter ones.
    """
    length = max(map(len, sequences)) if length is None else length
    ids = torch.full((len(sequences), length), pad_token_id)
    mask = torch.zeros(len(sequences), length, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        ids[row, length - len(sequence) :] = torch.tensor(sequence)
        mask[row, length - len(sequence) :] = 1
    return ids, mask


class EncodedExample(NamedTuple):
    """An example under a tokenizer.

    `continuation_ids` are the tokens of the continuation as they come after this prompt; empty
    where the tokenizer fuses the prompt's end with it, so that there is no token to ask for.
    """

    prompt: str
    continuation: str
    input_ids: list[int]
    continuation_ids: list[int]


class EncodedPair(NamedTuple):
    """Two examples, each the other's counterfactual."""

    first: EncodedExample
    second: EncodedExample

    @property
    def is_equal_length(self) -> bool:
        """Whether both prompts have the same number of tokens."""
        return len(self.first.input_ids) == len(self.second.input_ids)

    @property
    def is_expressible(self) -> bool:
        """Whether both answers are tokens of their own, and different ones."""
        first, second = self.first.continuation_ids, self.second.continuation_ids
        return bool(first and second) and first[0] != second[0]


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair], *, equal_only: bool = False
) -> list[EncodedPair]:
    """Tokenize pairs, without special tokens.

    Args:
        tokenizer: the model's tokenizer.
        pairs: any pairs.
        equal_only: leave out those whose prompts differ in length, before the rest is tokenized.

    Raises:
        ValueError: an empty prompt.
    """
    examples = [example for pair in pairs for example in pair]
    prompts = _tokenize(tokenizer, [example.prompt for example in examples])
    if equal_only:
        # i ^ 1 is the other side of the pair.
        kept = [i for i in range(len(examples)) if len(prompts[i]) == len(prompts[i ^ 1])]
        examples, prompts = [examples[i] for i in kept], [prompts[i] for i in kept]
    wholes = _tokenize(tokenizer, [example.prompt + example.continuation for example in examples])
    encoded = []
    for example, ids, whole in zip(examples, prompts, wholes, strict=True):
        if not ids:
            raise ValueError("A prompt is empty; every prompt needs at least one token.")
        continuation = whole[len(ids) :] if whole[: len(ids)] == ids else []
        encoded.append(EncodedExample(*example, ids, continuation))
    return [EncodedPair(*sides) for sides in zip(encoded[::2], encoded[1::2], strict=True)]


def check_expressible(
    name: str, tokenizer: PreTrainedTokenizerBase, pair: EncodedPair, single_tokens: bool = False
) -> None:
    """Raise `TaskNotExpressibleError` where no single token tells the two answers apart.

    Args:
        name: the task's name.
        tokenizer: the one that encoded the pair.
        pair: any pair.
        single_tokens: whether each answer must also be no more than one token.
    """
    for side, other in (pair, pair[::-1]):
        ids = side.continuation_ids
        if not ids:
            problem = "is fused with the prompt's end, so that the answer is no token of its own"
        elif single_tokens and len(ids) > 1:
            problem = "must be a single token, such as its first"
        elif ids[0] == next(iter(other.continuation_ids), None):
            problem = f"begins with the same token as {other.continuation!r}"
        else:
            continue
        tokens = ", ".join(repr(tokenizer.decode([index])) for index in ids)
        raise TaskNotExpressibleError(
            f"Task {name!r}: after {side.prompt!r} the candidate {side.continuation!r} (tokens: "
            f"{tokens or 'none'}) {problem}; use another candidate or tokenizer."
        )


def _tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    if not texts:  # of which transformers makes an IndexError
        return []
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


def _rows(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[EncodedPair]) -> Dataset:
    rows = []
    for first, second in pairs:
        for side, other in ((first, second), (second, first)):
            target, other_target = side.continuation_ids[0], other.continuation_ids[0]
            texts = tokenizer.decode([target]), tokenizer.decode([other_target])
            ids = side.input_ids, other.input_ids
            rows.append((side.prompt, other.prompt, *texts, *ids, target, other_target))
    return Dataset.from_list(
        [dict(zip(FEATURES, row, strict=True)) for row in rows], features=FEATURES
    )
