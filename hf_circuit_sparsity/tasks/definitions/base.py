"""What a task definition is, and how a file of this folder adds one."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

Split = Literal["train", "test"]
Language = Literal["python", "english"]


class Example(NamedTuple):
    """A prompt and the code or text that follows it, of which the first token is the answer."""

    prompt: str
    continuation: str


# Two prompts that differ in what decides the answer; each is the other's counterfactual.
Pair = tuple[Example, Example]
PairGenerator = Callable[[random.Random, Split], Pair]


@dataclass(frozen=True)
class TaskDefinition:
    """A task as text, before any tokenizer.

    `generate(rng, split)` draws one pair. It must depend on nothing but its arguments, and the two
    splits must share neither templates nor names.
    """

    name: str
    description: str
    generate: PairGenerator
    language: Language = "python"


DEFINITIONS: dict[str, TaskDefinition] = {}


def define(
    name: str, description: str, language: Language = "python"
) -> Callable[[PairGenerator], PairGenerator]:
    """Register the decorated generator of pairs as the task `name`.

    Raises:
        ValueError: another task has the name.
    """

    def register(generate: PairGenerator) -> PairGenerator:
        if name in DEFINITIONS:
            raise ValueError(f"The task {name!r} is defined twice; give one of them another name.")
        DEFINITIONS[name] = TaskDefinition(name, description, generate, language)
        return generate

    return register
