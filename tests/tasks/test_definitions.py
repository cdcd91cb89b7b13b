"""Data tests: for each task, the answer follows from the prompt by a rule written here."""

import builtins
import keyword
import re

import pytest

from hf_circuit_sparsity.tasks import list_tasks, load_task
from hf_circuit_sparsity.tasks.definitions import words
from hf_circuit_sparsity.tasks.definitions.base import define
from hf_circuit_sparsity.tasks.definitions.words import Bank

TASKS = ["bracket_counting", "single_double_quote", "while_return_true"]


@pytest.fixture(scope="module")
def tasks(tokenizer):
    return {name: load_task(name, tokenizer) for name in TASKS}


@pytest.fixture(params=TASKS)
def task(request, tasks):
    return tasks[request.param]


def rows(task):
    return [*task.train, *task.test]


def open_quote(code):
    """The quote of the string that is open at the end of the code, or None."""
    quote = None
    for character in code:
        if character == quote:
            quote = None
        elif quote is None and character in "'\"":
            quote = character
    return quote


def open_brackets(code):
    """How many square brackets are open at the end of the code."""
    return code.count("[") - code.count("]")


# What Python goes on with after the prompt.
RULES = {
    "single_double_quote": lambda prompt: open_quote(prompt) + " ",
    "bracket_counting": lambda prompt: "]" * open_brackets(prompt) + "\n",
    "while_return_true": lambda prompt: {"while": ":\n", "return": "\n"}[prompt.split()[-2]],
}


def test_every_task_has_a_rule():
    assert list_tasks() == TASKS == sorted(RULES)


def test_the_answer_follows_from_the_prompt(task, tokenizer):
    for row in rows(task):
        answers = []
        for prompt, ids in (
            (row["prompt"], row["input_ids"]),
            (row["counterfactual_prompt"], row["counterfactual_input_ids"]),
        ):
            whole = tokenizer(prompt + RULES[task.name](prompt))["input_ids"]
            assert whole[: len(ids)] == ids == tokenizer(prompt)["input_ids"]
            answers.append(whole[len(ids)])
        assert answers == [row["target_id"], row["counterfactual_target_id"]]
        assert answers[0] != answers[1]
        assert tokenizer.decode(answers) == row["target"] + row["counterfactual_target"]


def test_the_candidates(tasks):
    expected = {
        "single_double_quote": {"'", '"'},
        "bracket_counting": {"]\n", "]"},
        "while_return_true": {":\n", "\n"},
    }
    for name, task in tasks.items():
        assert set(task.train["target"]) == set(task.test["target"]) == expected[name]


def test_pairs_differ_only_in_what_decides_the_answer(task):
    assert task.equal_length
    for row in rows(task):
        ids, other = row["input_ids"], row["counterfactual_input_ids"]
        # The digit in place of a bracket may be merged with the next, and so change two tokens.
        limit = 2 if task.name == "bracket_counting" else 1
        assert 1 <= sum(a != b for a, b in zip(ids, other, strict=True)) <= limit


def test_bracket_depth_and_open_quotes(tasks):
    depths = {open_brackets(row["prompt"]) for row in rows(tasks["bracket_counting"])}
    assert depths == {1, 2}
    assert all(open_quote(row["prompt"]) for row in rows(tasks["single_double_quote"]))
    # Elsewhere, nothing is left open that would have to be closed first.
    for row in rows(tasks["bracket_counting"]):
        assert open_quote(row["prompt"]) is None
        assert row["prompt"].count("(") == row["prompt"].count(")")


def test_size_balance_and_lengths(task):
    assert task.train.num_rows == 2000 and task.test.num_rows == 512
    for split in (task.train, task.test):
        targets = split["target"][:]
        assert {targets.count(target) for target in set(targets)} == {len(targets) // 2}
        lengths = [len(ids) for ids in split["input_ids"]]
        assert max(lengths) < 64
        assert min(lengths) < 16
        assert len(set(lengths)) >= 10
        prompts = split["prompt"][:]
        assert len(set(prompts)) == len(prompts)


SHARED = {*keyword.kwlist, *dir(builtins), "self"}


def names(prompts):
    prompts = [re.sub("%[sd]", "", prompt) for prompt in prompts]
    return {name for prompt in prompts for name in re.findall(r"[A-Za-z_]\w*", prompt)}


def skeleton(prompt):
    """A prompt without its names, values and string contents."""
    prompt = re.sub(r"""(['"]).*$""", "S", prompt)
    prompt = re.sub(
        r"[A-Za-z_]\w*", lambda m: m[0] if m[0] in SHARED else "N", prompt.replace("-", "")
    )
    prompt = re.sub(r"\d+(\.\d+)?", "0", prompt)
    return re.sub(r"\[+(0|N)(, (0|N))*$", "LIST", prompt)


def test_train_and_test_share_no_prompt_no_name_and_no_template(task):
    train, test = task.train["prompt"][:], task.test["prompt"][:]
    assert set(train).isdisjoint(test)
    assert (names(train) - SHARED).isdisjoint(names(test) - SHARED)
    train_skeletons, test_skeletons = ({skeleton(p) for p in split} for split in (train, test))
    assert train_skeletons.isdisjoint(test_skeletons)
    assert len(train_skeletons) >= 7 and len(test_skeletons) >= 6
    if task.name != "while_return_true":  # whose last line is given by its name
        last = [{s.split("\n")[-1].strip() for s in k} for k in (train_skeletons, test_skeletons)]
        assert last[0].isdisjoint(last[1])


def test_deterministic_from_the_seed(openai):
    for name in TASKS:
        first, second, other = (
            load_task(name, openai, n_train=50, n_test=20, seed=seed) for seed in (0, 0, 1)
        )
        more = load_task(name, openai, n_train=600, n_test=400)
        for split in ("train", "test"):
            one, two, three, many = (getattr(t, split) for t in (first, second, other, more))
            assert one.to_dict() == two.to_dict()
            assert one["prompt"][:] != three["prompt"][:]
            assert many.select(range(len(one))).to_dict() == one.to_dict()


def test_the_word_lists_hold_nothing_twice_and_nothing_that_decides_an_answer():
    banks = [bank for bank in vars(words).values() if isinstance(bank, Bank)]
    assert len(banks) == 6
    train = {entry for bank in banks for entry in bank.train}
    test = {entry for bank in banks for entry in bank.test}
    assert train.isdisjoint(test)
    for bank in banks:
        assert len({*bank.train, *bank.test}) == len(bank.train) + len(bank.test)
    for entry in train | test:
        assert re.fullmatch(r"\w+", entry)
    for bank in banks:
        if bank is not words.WORDS:
            assert not {*bank.train, *bank.test} & set(keyword.kwlist)


def test_two_tasks_cannot_have_one_name():
    with pytest.raises(ValueError, match="'bracket_counting' is defined twice"):
        define("bracket_counting", "Another.")(lambda rng, split: None)
