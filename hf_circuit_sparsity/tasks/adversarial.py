"""Prompts that a circuit's mechanism may stumble over.

A circuit that only looks for a cue somewhere in the context, or that averages over it, is misled
where the cue of the other answer stands there as well, or where the context is long.
"""

import random
from collections.abc import Callable
from dataclasses import replace

from datasets import concatenate_datasets
from transformers import PreTrainedTokenizerBase

from .binary_task import BinaryTask
from .definitions.base import DEFINITIONS, Example, Pair, Split
from .definitions.brackets import TEMPLATES as LIST_TEMPLATES
from .definitions.words import WORDS, surround
from .encoding import EncodedPair, encode_pairs

PairGenerator = Callable[[random.Random], Pair]


def _other_answer_before(name: str, split: Split = "test") -> PairGenerator:
    """A finished example of the other answer stands on the lines before."""

    def generate(rng: random.Random) -> Pair:
        definition = DEFINITIONS[name]
        pair, earlier = (definition.generate(rng, split) for _ in range(2))

        def after(finished: Example, example: Example) -> Example:
            text = (finished.prompt + finished.continuation).rstrip(" ")
            return example._replace(prompt=text.rstrip("\n") + "\n" + example.prompt)

        return after(earlier[1], pair[0]), after(earlier[0], pair[1])

    return generate


def _other_quote_inside(rng: random.Random) -> Pair:
    """The string holds the other quote, as the apostrophe in "it's"."""
    template, names = surround(rng, "test", rng.choice(("{v} += ", "yield ", "{v} = {f}(")))
    before = template.format(**names)
    words = WORDS.sample(rng, "test", 4)
    at = rng.randrange(1, 3)
    sides = []
    for quote, other in ("'\"", "\"'"):
        text = " ".join(words[:at]) + other + " ".join(["", *words[at:]])
        sides.append(Example(before + quote + text, f"{quote} "))
    return sides[0], sides[1]


def _long_list(rng: random.Random) -> Pair:
    """Twelve numbers and more: a depth that is averaged over the list is thinned out."""
    template, names = surround(rng, "test", rng.choice(LIST_TEMPLATES["test"]))
    opened = template.format(**names)
    numbers = ", ".join(str(rng.randrange(100)) for _ in range(rng.randrange(12, 24)))
    return (
        Example(f"{opened}{rng.randrange(1, 10)}{numbers}", "]\n"),
        Example(f"{opened}[{numbers}", "]]\n"),
    )


# So many times as many prompts are drawn as are asked for, at most.
_MOST_DRAWS = 12

_OTHER_ANSWER_BEFORE = (
    "bracket_brace", "bracket_counting", "else_elif", "for_while", "fstring_brace", "if_equals",
    "indent_for", "set_or_string", "set_or_string_fixedvarname", "single_double_quote", "var_if",
    "while_return_true", "with_as",
)  # fmt: skip
ADVERSARIES: dict[str, dict[str, PairGenerator]] = {
    name: {"other_answer_before": _other_answer_before(name)} for name in _OTHER_ANSWER_BEFORE
}
ADVERSARIES["single_double_quote"]["other_quote_inside"] = _other_quote_inside
ADVERSARIES["bracket_counting"]["long_list"] = _long_list


def load_adversarial_tasks(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    n: int = 256,
    seed: int = 0,
    max_length: int | None = None,
) -> dict[str, BinaryTask]:
    """The adversarial versions of a built-in task, by kind; empty where there are none.

    `train` and `test` hold the same rows: nothing may be fitted on them. Both have up to `n` rows,
    fewer where prompts of at most `max_length` tokens that the tokenizer can express are rare; a
    kind without any is left out.

    Args:
        name: of a task.
        tokenizer: the model's.
        n: rows, an even number.
        seed: another seed, other rows.
        max_length: prompts longer than this are left out.
    """
    tasks = {}
    for kind, generate in ADVERSARIES.get(name, {}).items():
        rng = random.Random(f"{name}/{kind}/{seed}")
        pairs = encode_pairs(tokenizer, [generate(rng) for _ in range(2 * n)])
        usable = [pair for pair in pairs if _is_usable(pair, max_length)][: n // 2]
        if usable:
            description = f"{DEFINITIONS[name].description} ({kind.replace('_', ' ')})"
            tasks[kind] = BinaryTask.from_encoded(
                f"{name}/{kind}", description, tokenizer, usable, usable
            )
    return tasks


def has_distractors(task: BinaryTask) -> bool:
    """Whether [`with_distractors`] knows some for a task."""
    return task.text is None and task.name in _OTHER_ANSWER_BEFORE


def with_distractors(
    task: BinaryTask,
    fraction: float,
    *,
    seed: int = 0,
    max_length: int | None = None,
    split: Split = "train",
) -> BinaryTask:
    """The task with other training rows: before some of them stands a distractor.

    That is a finished example of the other answer, on the lines before. On such prompts a circuit
    fails that looks for a cue of the answer anywhere.

    Args:
        task: a built-in one.
        fraction: of the training rows that are replaced, in [0, 1].
        seed: another seed, other rows.
        max_length: prompts longer than this are left out.
        split: whose templates and names the new rows are made of.

    Raises:
        ValueError: no distractors are known for the task, or too few of them fit.
    """
    name, pairs = task.name, round(fraction * len(task.train) / 2)
    if not pairs:
        return task
    if not has_distractors(task):
        raise ValueError(
            f"No distractors are known for the task {name!r}, only for "
            f"{', '.join(_OTHER_ANSWER_BEFORE)}: leave the fraction of them at 0, or put such "
            "prompts into a task of your own."
        )
    generate, rng = _other_answer_before(name, split), random.Random(f"{name}/distractors/{seed}")
    usable: list[EncodedPair] = []
    for _ in range(_MOST_DRAWS):
        drawn = [generate(rng) for _ in range(pairs)]
        encoded = encode_pairs(task.tokenizer, drawn, equal_only=task.equal_length)
        usable += [pair for pair in encoded if _is_usable(pair, max_length)]
        if len(usable) >= pairs:
            break
    else:
        raise ValueError(
            f"{2 * pairs} training rows of the task {name!r} were to have a distractor before "
            f"them, but of {_MOST_DRAWS} times as many only {2 * len(usable)} have at most "
            f"{max_length} tokens: use fewer, or a model with a longer context."
        )
    rows = BinaryTask.from_encoded(
        name, task.description, task.tokenizer, usable[:pairs], usable[:1]
    ).train
    kept = task.train.select(range(len(task.train) - 2 * pairs))
    return replace(task, train=concatenate_datasets([kept, rows]))


def _is_usable(pair: EncodedPair, max_length: int | None) -> bool:
    longest = max(len(side.input_ids) for side in pair)
    return pair.is_expressible and (max_length is None or longest <= max_length)
