"""Adversarial prompts: the answer still follows from the prompt, by the rules."""

import re

import pytest

from hf_circuit_sparsity import load_task
from hf_circuit_sparsity.tasks.adversarial import (
    ADVERSARIES,
    load_adversarial_tasks,
    with_distractors,
)
from hf_circuit_sparsity.tasks.corpus import build_corpus
from hf_circuit_sparsity.tasks.tokenizer import train_tokenizer
from tests.tasks.rules import open_brackets, open_quote


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(build_corpus()["train"].select(range(0, 700, 10)), vocab_size=1000)


def test_strings_with_the_other_quote_inside(tokenizer):
    task = load_adversarial_tasks("single_double_quote", tokenizer)["other_quote_inside"]
    for row in task.test:
        quote = open_quote(row["prompt"])
        other = {"'": '"', '"': "'"}[quote]
        assert row["target"].startswith(quote) and other in row["prompt"]
        assert row["counterfactual_target"].startswith(other)
        assert len(row["input_ids"]) == len(row["counterfactual_input_ids"])


def test_long_lists(tokenizer):
    task = load_adversarial_tasks("bracket_counting", tokenizer, max_length=128)["long_list"]
    answers = {True: set(), False: set()}
    for row in task.test:
        assert row["prompt"].count(",") >= 11 and len(row["input_ids"]) <= 128
        answers[open_brackets(row["prompt"]).endswith("[[")].add(row["target"])
    # One bracket that ends the line, against one that another follows.
    (flat,), (nested,) = answers[False], answers[True]
    assert flat != nested and flat.startswith("]") and nested.startswith("]")


@pytest.mark.parametrize("name", sorted(ADVERSARIES))
def test_the_other_answer_stands_before(name, tokenizer):
    tasks = load_adversarial_tasks(name, tokenizer, n=64, max_length=128)
    again = load_adversarial_tasks(name, tokenizer, n=64, max_length=128)
    task = tasks["other_answer_before"]
    assert 32 <= len(task.test) <= 64 and task.name == f"{name}/other_answer_before"
    assert task.test["prompt"] == again["other_answer_before"].test["prompt"]
    for row in task.test:
        assert row["target_id"] != row["counterfactual_target_id"]
        if name == "single_double_quote":
            assert row["target"].startswith(open_quote(row["prompt"]))
            assert {"'", '"'} <= set(row["prompt"])


def test_distractors_stand_before_some_of_the_training_rows(tokenizer):
    task = load_task("single_double_quote", tokenizer, n_train=80, n_test=64)
    mixed = with_distractors(task, 0.25, max_length=128)
    plain, with_other = mixed.train["prompt"][:60], mixed.train["prompt"][60:]
    assert plain == task.train["prompt"][:60] and len(with_other) == 20
    assert mixed.test is task.test and mixed.equal_length
    for row in mixed.train.select(range(60, 80)):
        assert row["target"].startswith(open_quote(row["prompt"]))
        assert {"'", '"'} <= set(row["prompt"])
    # Held-out prompts of this kind are made of other templates and names; keywords they share.
    held_out = load_adversarial_tasks("single_double_quote", tokenizer, max_length=128)
    held_out = held_out["other_answer_before"].test["prompt"]
    words = [{w for p in of for w in re.findall("[a-z]{4,}", p)} for of in (with_other, held_out)]
    assert len(words[0] & words[1]) < 0.15 * len(words[0])
    again, other = (with_distractors(task, 0.25, seed=seed, max_length=128) for seed in (0, 1))
    assert again.train["prompt"] == mixed.train["prompt"] != other.train["prompt"]
    assert with_distractors(task, 0.0) is task


def test_distractors_that_there_are_not_are_refused(tokenizer):
    task = load_task("enumerate_range", tokenizer, n_train=20, n_test=20)
    with pytest.raises(ValueError, match="only for bracket_brace"):
        with_distractors(task, 0.5)
    task = load_task("single_double_quote", tokenizer, n_train=20, n_test=20)
    with pytest.raises(ValueError, match="at most 12 tokens"):
        with_distractors(task, 0.5, max_length=12)


def test_tasks_without_adversaries_have_none(tokenizer):
    assert load_adversarial_tasks("enumerate_range", tokenizer) == {}
