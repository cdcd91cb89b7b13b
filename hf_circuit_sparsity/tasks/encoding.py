"""Pairs of prompts under a tokenizer, and prompts as one tensor."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from .definitions.base import Pair


class TaskNotExpressibleError(ValueError):
    """The tokenizer has no single tokens that tell the task's two answers apart."""


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
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    pair: EncodedPair,
    single_tokens: bool = False,
    row: str = "",
) -> None:
    """Raise `TaskNotExpressibleError` where no single token tells the two answers apart.

    Args:
        name: the task's name.
        tokenizer: the one that encoded the pair.
        pair: any pair.
        single_tokens: whether each answer must also be no more than one token.
        row: where in a table the pair stands, if it does.
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
            f"Task {name!r}{row and ', '}{row}: after {side.prompt!r} the candidate "
            f"{side.continuation!r} (tokens: {tokens or 'none'}) {problem}; use another candidate "
            "or tokenizer."
        )


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


def _tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    if not texts:  # of which transformers makes an IndexError
        return []
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
