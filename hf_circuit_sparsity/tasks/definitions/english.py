"""Tasks about English sentences.

Every answer is a common word behind a space, or a mark: one token for GPT-2's vocabulary and those
that are like it. No name, noun or sentence of the train split is in the test split.
"""

import random

from .base import Example, Pair, Split, define
from .words import Bank, _bank

MEN = _bank(
    "John James Robert Michael William David Richard Joseph Thomas Daniel Paul Mark George Kevin",
    "Peter Andrew Brian Edward Jason Ryan Eric Jack Henry Adam Frank Scott",
)
WOMEN = _bank(
    "Mary Sarah Lisa Anna Emily Jane Laura Susan Karen Linda Maria Rachel Alice Julie",
    "Jennifer Elizabeth Emma Kate Helen Rebecca Michelle Nancy Sally Amy Lucy Claire",
)
PLACES = _bank(
    "house school garden park market office station church kitchen bank forest village",
    "hospital library beach museum theatre farm castle airport hotel factory river bridge",
)
THINGS = _bank(
    "book letter ring ball flower cake key coat watch map",
    "box picture bottle ticket pen hat lamp card basket coin",
)
NOUNS = _bank(
    "dog boy car tree bird horse teacher player song door friend window cat",
    "girl ship cow doctor table road king writer chair cup farmer shirt driver",
)
ADJECTIVES = _bank("old small quiet big red tired", "young tall black heavy new strange")

_PRONOUN: dict[Split, tuple[str, ...]] = {
    "train": (
        "When {name} came back from the {place},", "{name} took the {thing} to the {place} because",
        "After {name} lost the {thing} near the {place},", "{name} went to the {place} and there",
        "All in the {place} like {name} because", "As {name} held the {thing} at the {place},",
        "{name} left the {place} without the {thing} when",
    ),
    "test": (
        "Before {name} reached the {place},", "{name} found the {thing} behind the {place} while",
        "{name} stayed at the {place} until", "Since {name} sold the {thing} to the {place},",
        "Once {name} saw the {place},", "{name} hid the {thing} from the {place} so that",
    ),
}  # fmt: skip


@define(
    "pronoun_by_name",
    "The pronoun follows the name: ' he' after a man's, ' she' after a woman's.",
    "english",
)
def pronoun_by_name(rng: random.Random, split: Split) -> Pair:
    template = rng.choice(_PRONOUN[split])
    names = {"place": PLACES.choice(rng, split), "thing": THINGS.choice(rng, split)}
    man, woman = (
        Example(template.format(name=bank.choice(rng, split), **names), f" {pronoun} was")
        for bank, pronoun in ((MEN, "he"), (WOMEN, "she"))
    )
    return man, woman


_GIVING: dict[Split, tuple[str, ...]] = {
    "train": (
        "{a} and {b} went to the {place}. {giver} gave a {thing} to",
        "{a} and {b} met at the {place}, and {giver} handed a {thing} to",
        "While {a} and {b} were at the {place}, {giver} passed a {thing} to",
    ),
    "test": (
        "{a} and {b} stood in front of the {place}. {giver} offered a {thing} to",
        "After {a} and {b} had left the {place}, {giver} showed a {thing} to",
        "{a} and {b} walked around the {place} until {giver} sold a {thing} to",
    ),
}


@define(
    "indirect_object",
    "Of two names, the one that does not give is the one that gets; the answer is its first token.",
    "english",
)
def indirect_object(rng: random.Random, split: Split) -> Pair:
    people = Bank(MEN.train + WOMEN.train, MEN.test + WOMEN.test)
    a, b = people.sample(rng, split, 2)
    while a[0] == b[0]:  # a small vocabulary has one token for the start of both
        a, b = people.sample(rng, split, 2)
    template = rng.choice(_GIVING[split])
    place, thing = PLACES.choice(rng, split), THINGS.choice(rng, split)
    first, second = (
        Example(template.format(a=a, b=b, giver=giver, place=place, thing=thing), f" {other}.")
        for giver, other in ((b, a), (a, b))
    )
    return first, second


_SUBJECTS: dict[Split, tuple[str, ...]] = {
    "train": (
        "The {subject} near the {place}", "The {adjective} {subject} by the {place}",
        "I know that the {subject} of the {other}", "The {subject} with the {adjective} {other}",
    ),
    "test": (
        "The {subject} behind the {place}", "We think the {adjective} {subject} at the {place}",
        "Perhaps the {subject} from the {place}", "The {adjective} {subject} beside the {other}",
    ),
}  # fmt: skip


@define(
    "subject_verb_number",
    "The verb follows the subject's number, not that of a noun in between: ' is' or ' are'.",
    "english",
)
def subject_verb_number(rng: random.Random, split: Split) -> Pair:
    template = rng.choice(_SUBJECTS[split])
    subject, other = NOUNS.sample(rng, split, 2)
    names = {
        "place": PLACES.choice(rng, split), "adjective": ADJECTIVES.choice(rng, split),
        "other": other + rng.choice(("", "s")),
    }  # fmt: skip
    return (
        Example(template.format(subject=subject, **names), " is here"),
        Example(template.format(subject=f"{subject}s", **names), " are here"),
    )


_TIMES: dict[Split, tuple[tuple[str, str], ...]] = {
    "train": (
        ("Yesterday", "Today"), ("Last year", "This year"), ("A week ago", "At the moment"),
        ("Last night", "Right now"), ("An hour ago", "At this hour"),
    ),
    "test": (
        ("Last summer", "This summer"), ("Back then", "Just now"), ("Years ago", "At this time"),
        ("Last month", "This month"), ("In the past", "In the present"),
    ),
}  # fmt: skip
_TENSED: dict[Split, tuple[str, ...]] = {
    "train": ("{time} the {noun} near the {place}", "{time}, the {adjective} {noun}",
              "{time}, my {adjective} {noun} from the {place}",
              "{time} every {adjective} {noun} at the {place}"),
    "test": ("{time} the {noun} behind the {place}", "{time}, our {adjective} {noun}",
             "{time}, this {noun} by the {place}", "{time} each {noun} of the {place}"),
}  # fmt: skip


@define("tense", "The verb follows the time: ' was' in the past, ' is' in the present.", "english")
def tense(rng: random.Random, split: Split) -> Pair:
    template = rng.choice(_TENSED[split])
    names = {
        "noun": NOUNS.choice(rng, split), "place": PLACES.choice(rng, split),
        "adjective": ADJECTIVES.choice(rng, split),
    }  # fmt: skip
    past, present = (
        Example(template.format(time=time, **names), f" {verb} here")
        for time, verb in zip(rng.choice(_TIMES[split]), ("was", "is"), strict=True)
    )
    return past, present


# A question and a statement of the same words.
_ASKED: dict[Split, tuple[tuple[str, str], ...]] = {
    "train": (
        ("Is the {noun} in the {place}", "The {noun} is in the {place}"),
        ("Was the {noun} {adjective} at the {place}", "The {noun} was {adjective} at the {place}"),
        ("Will the {noun} go to the {place}", "The {noun} will go to the {place}"),
    ),
    "test": (
        ("Can the {noun} see the {place}", "The {noun} can see the {place}"),
        ("Has the {noun} left the {place}", "The {noun} has left the {place}"),
        ("Should the {adjective} {noun} find the {place}",
         "The {adjective} {noun} should find the {place}"),
    ),
}  # fmt: skip


@define(
    "question_mark",
    "A sentence whose verb comes first ends with '?', one whose subject does with '.'.",
    "english",
)
def question_mark(rng: random.Random, split: Split) -> Pair:
    names = {
        "noun": NOUNS.choice(rng, split), "place": PLACES.choice(rng, split),
        "adjective": ADJECTIVES.choice(rng, split),
    }  # fmt: skip
    question, statement = (form.format(**names) for form in rng.choice(_ASKED[split]))
    return Example(question, "? "), Example(statement, ". ")
