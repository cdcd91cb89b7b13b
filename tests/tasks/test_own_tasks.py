"""Tasks of one's own: from tables and files, and what is refused before any work."""

import json
import re

import pytest
from datasets import Dataset, DatasetDict

from hf_circuit_sparsity.tasks.binary_task import BinaryTask
from hf_circuit_sparsity.tasks.encoding import TaskNotExpressibleError
from hf_circuit_sparsity.tasks.load import check_tasks, load_task
from hf_circuit_sparsity.tasks.text import COLUMNS, MAX_BYTES, read_task_text, text_of_table
from tests.circuits.planted import on_off_task, word_tokenizer
from tests.tasks.own_tasks import PAIRS, rows, write_csv


@pytest.fixture(scope="module")
def words():
    return word_tokenizer()


def prompts(split):
    return {row["prompt"] for row in split}


def test_a_csv_becomes_pairs_in_both_directions(tmp_path, words):
    task = BinaryTask.from_csv(write_csv(tmp_path / "switch.csv"), words, description="Which way?")
    assert (task.name, task.description) == ("switch", "Which way?")
    assert prompts(task.train) | prompts(task.test) == {p for pair in PAIRS for p in pair[:2]}
    for split in (task.train, task.test):
        for row, other in zip(
            split.select(range(0, len(split), 2)),
            split.select(range(1, len(split), 2)),
            strict=True,
        ):
            assert row["prompt"] == other["counterfactual_prompt"]
            assert {row["target"], other["target"]} == {" yes", " no"}
    assert load_task(str(tmp_path / "switch.csv"), words).text.train == task.text.train


def test_text_comes_through_as_it_is_written(tmp_path, openai):
    table = [
        {**row, "prompt": f'x = "é, {i}"\n\n\r\nNA ', "counterfactual_prompt": f"y {i} ",
         "target": "None", "counterfactual_target": "nan"}
        for i, row in enumerate(rows())
    ]  # fmt: skip
    text = load_csv(write_csv(tmp_path / "a.csv", table))
    assert {pair[0].prompt for pair in (*text.train, *text.test)} == {r["prompt"] for r in table}
    assert {pair[1].continuation for pair in (*text.train, *text.test)} == {"nan"}
    (tmp_path / "bom.csv").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "a.csv").read_bytes())
    assert load_csv(tmp_path / "bom.csv").train == text.train


def load_csv(path):
    from hf_circuit_sparsity.tasks.text import read_csv

    return text_of_table(path.stem, {"all": read_csv(path)})


def test_templates_stay_together_and_the_seed_says_which(words):
    held_out = set()
    for seed in range(8):
        task = BinaryTask.from_dataset(Dataset.from_list(rows()), words, "switch", seed=seed)
        first_words = [{prompt[:2] for prompt in prompts(s)} for s in (task.train, task.test)]
        assert first_words[0].isdisjoint(first_words[1]) and len(first_words[1]) == 1
        held_out |= first_words[1]
    assert len(held_out) > 1


def test_a_split_column_and_a_dataset_of_two_splits_are_taken_as_they_are(words):
    table = [row | {"split": "test" if row["template"] == "b" else "train"} for row in rows()]
    task = BinaryTask.from_dataset(Dataset.from_list(table), words, "switch")
    assert {prompt[:2] for prompt in prompts(task.test)} == {"w1"}
    splits = DatasetDict({"train": task.train, "test": task.test, "validation": task.test})
    again = BinaryTask.from_dataset(splits, words, "switch")
    # Rows in both directions are one pair each, not two.
    assert again.train.to_list() == task.train.to_list()
    assert again.test.to_list() == task.test.to_list()


def broken(index=2, **changes):
    table = rows()
    table[index] = {**table[index], **changes}
    return table


@pytest.mark.parametrize(
    ("table", "named"),
    [
        ([{k: v for k, v in row.items() if k not in COLUMNS[1:3]} for row in rows()],
         "target, counterfactual_prompt"),
        ([], "no rows"),
        (rows()[:1], "two"),
        (broken(target=""), "row 3 .*target"),
        (broken(prompt=""), "row 3 .*prompt"),
        (broken(target=" no"), "row 3 .*' no'"),
        (broken(counterfactual_prompt=PAIRS[2][0]), "row 3 .*prompt"),
        (broken(target=" yes yes"), "row 3 .*' yes yes'"),
        ([r | {"split": "trian" if i == 4 else "train"} for i, r in enumerate(rows())],
         "row 5 .*'trian'"),
        ([row | {"split": "train"} for row in rows()], "test"),
        ([r | {"split": "test" if i == 2 else "train"} for i, r in enumerate(rows())],
         "row 3 .*template 'a'"),
        ([{**r, "template": "", "split": "test" if i else "train", "prompt": "w1 on"}
          for i, r in enumerate(rows())], "row 2 .*'w1 on'"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_table_is_named(tmp_path, words, table, named):
    path = write_csv(tmp_path / "mine.csv", table)
    with pytest.raises(ValueError, match=named) as refused:
        load_task(str(path), words)
    assert "mine" in str(refused.value) and len(str(refused.value)) < 600
    if table and len(table) == 12 and set(COLUMNS) <= set(table[0]):
        at = re.search(r"row (\d+)", named)
        one = "target" not in table[int(at[1]) - 1] if at else False
        with pytest.raises(ValueError, match=f"row {int(at[1]) - 1}\\b" if at else named):
            BinaryTask.from_dataset(Dataset.from_list(table), words, "mine")
        assert not one


def test_lengths_where_they_matter(words):
    table = broken(counterfactual_prompt="w1 w1 w1 off")
    unequal = BinaryTask.from_dataset(Dataset.from_list(table), words, "mine")
    assert not unequal.equal_length
    for options, named in (({"equal_length": True}, r"row 2\b"), ({"max_length": 3}, "max_length")):
        with pytest.raises(ValueError, match=named):
            BinaryTask.from_dataset(Dataset.from_list(table), words, "mine", **options)


def test_answers_that_are_not_single_tokens_name_their_row(tmp_path, openai):
    table = [{**row, "target": " in", "counterfactual_target": " =="} for row in rows()]
    table[7]["target"] = " extraordinarily"
    with pytest.raises(TaskNotExpressibleError, match=r"row 8 \(line 9\)"):
        BinaryTask.from_csv(write_csv(tmp_path / "a.csv", table), openai)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "lacks"),
        (b"\n\n", "lacks"),
        (b"prompt,prompt\n", "twice"),
        (b'{"prompt": 1}', "lacks"),
        (b"\x00" * 50, "lacks"),
        (",".join(COLUMNS).encode() + b"\na, yes,b\n", "3 values"),
        (",".join(COLUMNS).encode() + b'\n"a, yes,b, no\n', "CSV"),
        (",".join(COLUMNS).encode() + b"\n\xff\xfe, yes,b, no\n", "UTF-8"),
        (",".join(COLUMNS).encode() + b"\n" + b"a" * 200_000 + b", yes,b, no\n", "CSV"),
        (b" " * (MAX_BYTES + 1), "larger"),
    ],
)
def test_files_that_are_no_table(tmp_path, words, content, named):
    path = tmp_path / "mine.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=named) as refused:
        load_task(str(path), words)
    assert "mine.csv" in str(refused.value) and len(str(refused.value)) < 600


@pytest.mark.parametrize(
    "name", ["../up", "a/b", "a\\b", "", ".", "..", ".git", "x" * 97, "a b", "<b>", "a\n", "é"]
)
def test_names_that_could_not_be_those_of_folders(name, words):
    with pytest.raises(ValueError, match="named"):
        BinaryTask.from_dataset(Dataset.from_list(rows()), words, name)


@pytest.mark.parametrize("name", ["single_double_quote", "while_return_true"])
def test_nothing_takes_the_name_of_a_built_in_task(name, tmp_path, words):
    table = Dataset.from_list(rows())
    path = write_csv(tmp_path / f"{name}.csv")
    stored = tmp_path / "stored"
    BinaryTask.from_dataset(table, words, "mine").save_pretrained(stored)
    content = json.loads((stored / "task.json").read_text())
    (stored / "task.json").write_text(json.dumps({**content, "name": name}))
    for make in (
        lambda: BinaryTask.from_dataset(table, words, name),
        lambda: BinaryTask.from_csv(path, words),
        lambda: BinaryTask.from_pairs(name, words, on_off_task().text.train, []),
        lambda: BinaryTask.from_pretrained(stored, words),
        lambda: load_task(str(path), words),
        lambda: check_tasks([str(path)]),
    ):
        with pytest.raises(ValueError, match=f"{name}.*built-in"):
            make()
    assert BinaryTask.from_csv(path, words, "mine").name == "mine"


def test_a_saved_task_comes_back(tmp_path, words, openai):
    task = on_off_task()
    task.save_pretrained(tmp_path)
    for back in (BinaryTask.from_pretrained(tmp_path, words), load_task(str(tmp_path), words)):
        assert (back.name, back.text) == (task.name, task.text)
        assert back.train.to_list() == task.train.to_list()
        assert back.test.to_list() == task.test.to_list()
    assert BinaryTask.from_pretrained(tmp_path, words, name="other").name == "other"
    assert read_task_text(tmp_path).digest() == task.text.digest()
    with pytest.raises(ValueError, match="with_as"):
        load_task("with_as", openai, n_train=2, n_test=2).save_pretrained(tmp_path)


def test_a_task_of_ones_own_has_the_rows_it_has(tmp_path, words):
    path = str(write_csv(tmp_path / "mine.csv"))
    whole = load_task(path, words)
    assert len(whole.train) + len(whole.test) == 24
    some = load_task(path, words, n_train=4, n_test=2)
    assert some.train.to_list() == whole.train.select(range(4)).to_list()
    assert len(some.test) == 2


@pytest.mark.parametrize(
    "name", ["no_such_task", "nowhere.csv", "a:b", "", "single_double_quot", "../x", "~", "a/b/c"]
)
def test_a_name_that_leads_nowhere(name, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for call in (lambda: load_task(name, words), lambda: check_tasks([name])):
        with pytest.raises((ValueError, FileNotFoundError)) as refused:
            call()
        assert repr(name) in str(refused.value)
