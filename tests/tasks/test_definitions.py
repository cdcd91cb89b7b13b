"""Data tests: for each task, the answer follows from the prompt by a rule in rules.py."""

import builtins
import keyword
import re
from collections import Counter
from typing import NamedTuple

import pytest

from hf_circuit_sparsity.tasks.binary_task import BinaryTask
from hf_circuit_sparsity.tasks.definitions import words
from hf_circuit_sparsity.tasks.definitions.base import define
from hf_circuit_sparsity.tasks.definitions.words import Bank
from hf_circuit_sparsity.tasks.load import list_tasks, load_task
from tests.tasks.rules import GRAMMAR_LEAVES_OPEN, RULES, last_line, open_quote, parses


class Loaded(NamedTuple):
    """A task and its rows as plain dictionaries, which are read many times."""

    task: BinaryTask
    train: list[dict]
    test: list[dict]

    @property
    def rows(self) -> list[dict]:
        return self.train + self.test


@pytest.fixture(scope="module")
def tasks(tokenizer):
    loaded = {}
    for name in list_tasks("python"):
        task = load_task(name, tokenizer)
        loaded[name] = Loaded(task, task.train.to_list(), task.test.to_list())
    return loaded


@pytest.fixture(params=list_tasks("python"))
def task(request, tasks):
    return tasks[request.param]


def test_every_task_has_a_rule():
    assert list_tasks("python") == sorted(RULES) and len(RULES) == 20


def test_the_answer_follows_from_the_prompt(task, tokenizer):
    rule = RULES[task.task.name]
    for row in task.rows:
        other = row["counterfactual_prompt"]
        assert rule(row["prompt"]).startswith(row["target"])
        assert rule(other).startswith(row["counterfactual_target"])
        assert row["target_id"] != row["counterfactual_target_id"]
    some = task.train[:600] + task.test
    completed = tokenizer([row["prompt"] + rule(row["prompt"]) for row in some])["input_ids"]
    for row, whole in zip(some, completed, strict=True):
        n_tokens = len(row["input_ids"])
        assert whole[:n_tokens] == row["input_ids"]
        assert whole[n_tokens] == row["target_id"]
        assert tokenizer.decode([row["target_id"]]) == row["target"]


def test_the_other_answer_is_no_python(task):
    rule = RULES[task.task.name]
    leaves_open = GRAMMAR_LEAVES_OPEN.get(task.task.name, lambda prompt: False)
    for row in task.train[:600] + task.test:
        prompt = row["prompt"]
        assert parses(prompt + rule(prompt)), prompt
        if not leaves_open(prompt):
            assert not parses(prompt + rule(row["counterfactual_prompt"])), prompt


# The two answers, where they are the same in all pairs and under both tokenizers.
CANDIDATES = {
    "bracket_brace": {"]\n", "}"}, "bracket_counting": {"]\n", "]"},
    "enumerate_range": {" en", " range"}, "final_kwarg": {")\n", ","}, "for_while": {" in", ":\n"},
    "fstring_brace": {"}", ")"}, "if_equals": {" ==", " ="}, "if_ternary": {" else", ":\n"},
    "lambda_func": {":", ")\n"}, "set_or_string": {".add", " +="},
    "set_or_string_fixedvarname": {".add", " +="}, "single_double_quote": {"'", '"'},
    "var_if": {":\n", " ="}, "while_return_true": {":\n", "\n"}, "with_as": {")", "):\n"},
    "with_open": {")", ")\n"},
}  # fmt: skip


def test_the_candidates(tasks):
    for name, task in tasks.items():
        for split in (task.train, task.test):
            targets = Counter(row["target"] for row in split)
            assert targets == Counter(row["counterfactual_target"] for row in split)
            if name in CANDIDATES:
                assert set(targets) == CANDIDATES[name]
                assert set(targets.values()) == {len(split) // 2}
    # Names are cut differently by the two tokenizers, but are never a bare space.
    for row in tasks["class_init"].rows:
        assert row["target"] in (" __", " w", " wr", " wrap", " wrapper")
    for row in tasks["else_elif"].rows:
        assert row["target"] == ":\n" or re.fullmatch(" [a-z]+", row["target"])
    for row in tasks["var_swap"].rows:
        assert re.fullmatch(" [a-z]+", row["target"])
    # One level of indentation between the two, less the space that belongs to the next word.
    for row in tasks["indent_for"].rows:
        depths = {len(row["target"]), len(row["counterfactual_target"])}
        assert depths in ({3, 7}, {7, 11}) and not row["target"].strip()


# How many tokens of a prompt its counterfactual may lack: 1 where nothing else is said.
REPLACED = {
    "bracket_counting": 2,  # the digit in place of a bracket may be merged with the next
    "class_init": 12,  # the head, of which the names may be several tokens
    "enumerate_range": 0,  # the second variable has gone elsewhere
    "final_kwarg": 4,  # the stars and the name, of up to three tokens
    "set_or_string": 2, "set_or_string_fixedvarname": 2,  # ` set()`, ` ""` and the line end
    # The start of a line, or another line, of several tokens.
    "if_equals": 4, "if_ternary": 6, "indent_for": 6, "lambda_func": 6, "var_if": 6, "var_swap": 4,
    "with_open": 6,
}  # fmt: skip


def test_pairs_differ_only_in_what_decides_the_answer(task):
    assert task.task.equal_length
    limit = REPLACED.get(task.task.name, 1)
    for row in task.rows:
        ids, other = row["input_ids"], row["counterfactual_input_ids"]
        assert len(ids) == len(other) and ids != other
        assert sum((Counter(ids) - Counter(other)).values()) <= limit, row


def test_nothing_is_left_open_that_would_have_to_be_closed_first(tasks):
    for name, task in tasks.items():
        if name not in ("single_double_quote", "fstring_brace"):
            assert all(open_quote(row["prompt"]) is None for row in task.rows)


def test_size_and_lengths(task):
    assert len(task.train) == 2000 and len(task.test) == 512
    for split in (task.train, task.test):
        lengths = [len(row["input_ids"]) for row in split]
        assert max(lengths) < 64 and min(lengths) <= 25 and len(set(lengths)) >= 10
        assert len({row["prompt"] for row in split}) == len(split)


# What both splits may hold: the language, and what a task's definition fixes.
SHARED = {*keyword.kwlist, *dir(builtins), "self", "current", "key"}


def names(prompts):
    prompts = [re.sub(r"%[sd]|\bf(?=['\"])", "", prompt) for prompt in prompts]
    return {name for prompt in prompts for name in re.findall(r"[A-Za-z_]\w*", prompt)}


def skeleton(prompt):
    """A prompt without its names, values and string contents."""
    prompt = re.sub(r"""f?(['"])\1""", "E", prompt)
    prompt = re.sub(r"""f?(['"]).*$""", "S", prompt)
    prompt = prompt.replace("-", "")
    prompt = re.sub(r"[A-Za-z_]\w*", lambda m: m[0] if m[0] in SHARED else "N", prompt)
    prompt = re.sub(r"\d+(\.\d+)?", "0", prompt)
    return re.sub(r"[\[{]+(0|N)(, (0|N))*$", "LIST", prompt)


# In these the last line is given by the task, and the templates are what stands before it.
ONE_LAST_LINE = {"class_init", "else_elif", "enumerate_range", "for_while", "set_or_string",
                 "set_or_string_fixedvarname", "var_swap", "while_return_true"}  # fmt: skip


def test_train_and_test_share_no_prompt_no_name_and_no_template(task):
    train, test = ([row["prompt"] for row in split] for split in (task.train, task.test))
    assert set(train).isdisjoint(test)
    assert (names(train) - SHARED).isdisjoint(names(test) - SHARED)
    train_skeletons, test_skeletons = ({skeleton(p) for p in split} for split in (train, test))
    assert train_skeletons.isdisjoint(test_skeletons)
    assert len(train_skeletons) >= 7 and len(test_skeletons) >= 6
    if task.task.name not in ONE_LAST_LINE:
        last = [{last_line(s).strip() for s in k} for k in (train_skeletons, test_skeletons)]
        assert last[0].isdisjoint(last[1])
        assert min(map(len, last)) >= 4


def test_the_fixed_name_is_fixed_and_the_free_one_is_not(tasks):
    fixed, free = (
        {last_line(row["prompt"]).strip() for row in tasks[name].rows}
        for name in ("set_or_string_fixedvarname", "set_or_string")
    )
    assert fixed == {"current"} and len(free) >= 60


def test_the_same_seed_gives_the_same_rows_however_many_are_asked_for(task, tokenizer):
    name = task.task.name
    again = load_task(name, tokenizer, n_train=50, n_test=20)
    assert again.train.to_list() == task.train[:50] and again.test.to_list() == task.test[:20]


def test_another_seed_gives_other_rows(tasks, tokenizer):
    for name in list_tasks("python")[::4]:
        other = load_task(name, tokenizer, n_train=50, n_test=20, seed=1)
        assert other.train["prompt"][:] != [row["prompt"] for row in tasks[name].train[:50]]
        assert other.test["prompt"][:] != [row["prompt"] for row in tasks[name].test[:20]]


def test_the_word_lists_hold_nothing_twice_and_nothing_that_decides_an_answer():
    banks = [bank for bank in vars(words).values() if isinstance(bank, Bank)]
    assert len(banks) == 14
    train = {entry for bank in banks for entry in bank.train}
    test = {entry for bank in banks for entry in bank.test}
    assert train.isdisjoint(test)
    for bank in banks:
        assert len({*bank.train, *bank.test}) == len(bank.train) + len(bank.test)
        assert bank is words.WORDS or not {*bank.train, *bank.test} & set(keyword.kwlist)
    assert all(re.fullmatch(r"\w+", entry) for entry in train | test)


def test_two_tasks_cannot_have_one_name():
    with pytest.raises(ValueError, match="bracket_counting"):
        define("bracket_counting", "Another.")(lambda rng, split: None)
