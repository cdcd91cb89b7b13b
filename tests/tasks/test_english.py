"""The tasks on English: what decides their answers, and that the splits share nothing."""

import re

import pytest

from hf_circuit_sparsity.tasks.definitions import english
from hf_circuit_sparsity.tasks.definitions.words import Bank
from hf_circuit_sparsity.tasks.load import list_tasks, load_task

ENGLISH = ("indirect_object", "pronoun_by_name", "question_mark", "subject_verb_number", "tense")
BANKS = {n: bank for n, bank in vars(english).items() if isinstance(bank, Bank)}


def words(bank, split):
    return set(getattr(bank, split))


def answer(name, prompt):
    """What the prompt asks for, by another rule than that which made it."""
    people = [w for w in re.findall(r"[A-Z][a-z]+", prompt) if w in english_names()]
    if name == "pronoun_by_name":
        return " he" if people[0] in (*english.MEN.train, *english.MEN.test) else " she"
    if name == "indirect_object":
        return " " + next(person for person in people[:2] if people.count(person) == 1)
    if name == "question_mark":
        return "?" if prompt.split()[0] in ("Is", "Was", "Will", "Can", "Has", "Should") else "."
    if name == "tense":
        return (
            " was" if re.match("Yest|Last|A week|An hour|Back|Two|In the past", prompt) else " is"
        )
    nouns = (*english.NOUNS.train, *english.NOUNS.test)
    return next(
        " is" if word in nouns else " are"
        for word in re.findall(r"\w+", prompt) if word.removesuffix("s") in nouns
    )  # fmt: skip


def english_names():
    return {name for bank in (english.MEN, english.WOMEN) for split in bank for name in split}


def test_they_are_listed_by_language():
    assert list_tasks("english") == sorted(ENGLISH)
    assert sorted([*list_tasks("python"), *ENGLISH]) == list_tasks()
    with pytest.raises(ValueError, match="german"):
        list_tasks("german")


@pytest.mark.parametrize("name", ENGLISH)
def test_answers_follow_and_splits_share_nothing(name, tokenizer):
    task = load_task(name, tokenizer)
    assert len(task.train) == 2000 and len(task.test) == 512
    for row in [*task.train.to_list()[:600], *task.test.to_list()]:
        assert answer(name, row["prompt"]).startswith(row["target"])
        assert answer(name, row["counterfactual_prompt"]).startswith(row["counterfactual_target"])
        assert row["target_id"] != row["counterfactual_target_id"]
    for split in (task.train, task.test):
        assert len(set(split["prompt"][:])) == len(split)
        assert len(set(split["target"][:])) == 2 or name == "indirect_object"
    train, test = (set(split["prompt"][:]) for split in (task.train, task.test))
    used = [{w for p in prompts for w in re.findall(r"\w+", p)} for prompts in (train, test)]
    for bank in BANKS.values():
        assert not words(bank, "train") & used[1] and not words(bank, "test") & used[0]
    slots = "|".join(sorted({w for b in BANKS.values() for s in b for w in s}, key=len)[::-1])
    skeletons = [
        {re.sub(rf"\b({slots})s?\b", "_", p) for p in prompts} for prompts in (train, test)
    ]
    assert skeletons[0].isdisjoint(skeletons[1]) and min(map(len, skeletons)) >= 3


def test_no_word_is_in_both_splits():
    for bank in BANKS.values():
        assert len({*bank.train, *bank.test}) == len(bank.train) + len(bank.test)
