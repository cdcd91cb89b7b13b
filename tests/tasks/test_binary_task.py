import pytest
import torch
from datasets import Dataset

from hf_circuit_sparsity.tasks.binary_task import BinaryTask
from hf_circuit_sparsity.tasks.definitions.base import DEFINITIONS, Example, TaskDefinition
from hf_circuit_sparsity.tasks.encoding import TaskNotExpressibleError, encode_pairs
from hf_circuit_sparsity.tasks.load import build_task_datasets, list_tasks, load_task

PAIRS = [
    (("x = 'a", "'"), ('x = "a', '"')),
    (("def f(x):\n    y = 'a", "'"), ('def f(x):\n    y = "b', '"')),
]


def test_rows_are_pairs_in_both_directions(openai):
    task = BinaryTask.from_pairs("mine", openai, PAIRS, PAIRS[:1], description="Mine.")
    assert (task.name, task.description) == ("mine", "Mine.")
    assert isinstance(task.train, Dataset) and task.train.num_rows == 4 and task.test.num_rows == 2
    assert task.train[2:]["prompt"] == [PAIRS[1][0][0], PAIRS[1][1][0]]
    for row, other in ((0, 1), (1, 0), (2, 3), (3, 2)):
        row, other = task.train[row], task.train[other]
        assert row["prompt"] == other["counterfactual_prompt"]
        assert row["target"] == other["counterfactual_target"]
        assert row["input_ids"] == other["counterfactual_input_ids"]
        assert row["target_id"] == other["counterfactual_target_id"]
        assert row["input_ids"] == openai(row["prompt"])["input_ids"]
        assert [row["target_id"]] == openai(row["target"])["input_ids"]


def test_tensors_are_padded_on_the_left(openai):
    task = BinaryTask.from_pairs("mine", openai, PAIRS, PAIRS)
    tensors = task.tensors("train")
    length = max(map(len, task.train["input_ids"]))
    for kind in ("", "counterfactual_"):
        ids, mask = tensors[f"{kind}input_ids"], tensors[f"{kind}attention_mask"]
        assert ids.shape == mask.shape == (4, length)
        for i, row in enumerate(task.train):
            prompt = row[f"{kind}input_ids"]
            padding = length - len(prompt)
            assert ids[i].tolist() == [openai.pad_token_id] * padding + prompt
            assert mask[i].tolist() == [0] * padding + [1] * len(prompt)
        assert tensors[f"{kind}target_ids"].tolist() == task.train[f"{kind}target_id"][:]
    assert all(tensor.dtype == torch.int64 for tensor in tensors.values())
    assert (tensors["attention_mask"] == 0).any()
    with pytest.raises(ValueError, match="'validation'"):
        task.tensors("validation")


def test_equal_length_is_measured(openai):
    assert BinaryTask.from_pairs("mine", openai, PAIRS, PAIRS).equal_length
    unequal = [(("x = 'a", "'"), ('x = "a b c', '"'))]
    assert not BinaryTask.from_pairs("mine", openai, PAIRS, unequal).equal_length


@pytest.mark.parametrize(
    "pair",
    [
        (("x = 'a", "foobar"), ('x = "a', '"')),  # more than one token
        (("x = 'a", "'"), ('x = "a', "'")),  # the same token
        (("x = 'a", ""), ('x = "a', '"')),  # none
        (("f(", ")"), ("f[", "]")),  # fused with the end of the prompt
    ],
)
def test_candidates_must_be_different_single_tokens(openai, pair):
    for splits in (([pair], PAIRS), (PAIRS, [pair])):
        with pytest.raises(TaskNotExpressibleError, match="'mine'"):
            BinaryTask.from_pairs("mine", openai, *splits)


def test_bad_pairs(openai):
    for train, test, argument in (
        (PAIRS, [], "test split"),
        ([(("", "'"), ("x", '"'))], PAIRS, "prompt"),
        (PAIRS, PAIRS, "max_length"),
    ):
        with pytest.raises(ValueError, match=argument):
            BinaryTask.from_pairs("mine", openai, train, test, max_length=5)


@pytest.mark.parametrize(
    ("name", "options", "argument"),
    [
        ("bracket_countin", {}, "'bracket_counting'"),
        ("zzz", {}, "bracket_brace, bracket_counting"),
        *(("bracket_counting", {k: n}, k) for k in ("n_train", "n_test") for n in (0, -2, 3)),
        ("bracket_counting", {"max_length": 8}, "max_length"),
    ],
)
def test_what_load_task_refuses(openai, name, options, argument):
    with pytest.raises(ValueError, match=argument):
        load_task(name, openai, **options)


def test_more_rows_than_a_task_has(openai, monkeypatch):
    def two_pairs(rng, split):
        name = rng.choice("xy")
        return Example(f"{name} = 'a", "' "), Example(f'{name} = "a', '" ')

    monkeypatch.setitem(DEFINITIONS, "small", TaskDefinition("small", "Two pairs.", two_pairs))
    assert load_task("small", openai, n_train=4, n_test=4).train.num_rows == 4
    with pytest.raises(ValueError, match=r"'small' .* 4 .* 6 "):
        load_task("small", openai, n_train=6)


# Both answers begin with the same byte: a bracket, a space, a line end.
NOT_IN_BYTES = {"bracket_counting", "class_init", "enumerate_range", "if_equals", "indent_for",
                "var_swap", "with_as", "with_open"}  # fmt: skip


def test_a_tokenizer_that_cannot_tell_the_answers_apart(bytes_only):
    with pytest.raises(TaskNotExpressibleError, match="'bracket_counting'"):
        build_task_datasets(bytes_only, ["bracket_counting"])
    with pytest.warns(UserWarning) as warned:
        tasks = build_task_datasets(bytes_only, n_train=4, n_test=2)
    assert set(tasks) == set(list_tasks("python")) - NOT_IN_BYTES
    for warning, name in zip(warned, sorted(NOT_IN_BYTES), strict=True):
        assert f"'{name}'" in str(warning.message)


def test_unequal_lengths_where_the_tokenizer_leaves_no_choice(bytes_only):
    # Without merges `while` is five tokens and `return` six.
    task = load_task("while_return_true", bytes_only, n_train=20, n_test=20)
    assert not task.equal_length
    both = zip(task.train["input_ids"], task.train["counterfactual_input_ids"], strict=True)
    assert {len(one) - len(other) for one, other in both} == {1, -1}
    assert load_task("single_double_quote", bytes_only, n_train=20, n_test=20).equal_length


def test_build_task_datasets(openai):
    tasks = build_task_datasets(openai, n_train=20, n_test=10, seed=3)
    assert list(tasks) == list_tasks("python")
    for name in ("bracket_counting", "with_open"):
        task = load_task(name, openai, n_train=20, n_test=10, seed=3)
        assert tasks[name]["train"].to_dict() == task.train.to_dict()
        assert tasks[name]["test"].to_dict() == task.test.to_dict()
    assert list(build_task_datasets(openai, ["with_as"], n_train=2, n_test=2)) == ["with_as"]


def test_pairs_of_unequal_length_can_be_left_out(openai):
    equal, unequal = (
        (Example("x = 'a", "' "), Example(f'x = "{text}', '" ')) for text in ("a", "a b c")
    )
    assert len(encode_pairs(openai, [equal, unequal])) == 2
    encoded = encode_pairs(openai, [unequal, equal, unequal], equal_only=True)
    assert encoded == encode_pairs(openai, [equal])
    assert encode_pairs(openai, [unequal], equal_only=True) == []


def test_a_few_pairs_of_equal_length_are_not_enough_to_ask_for_them(openai, monkeypatch):
    def one_in_a_hundred(rng, split):
        name, other = rng.sample(range(10**6), 2)
        longer = "" if other % 100 == 0 else " x"
        return Example(f"{name:07} = 'a", "' "), Example(f'{name:07} ={longer} "a', '" ')

    definition = TaskDefinition("rare", "Rarely of equal length.", one_in_a_hundred)
    monkeypatch.setitem(DEFINITIONS, "rare", definition)
    task = load_task("rare", openai, n_train=1000, n_test=512)
    assert task.train.num_rows == 1000 and not task.equal_length
