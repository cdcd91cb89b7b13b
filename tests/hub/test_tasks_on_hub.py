"""Tasks of one's own on the Hub: there and back, several in one dataset, and who may not."""

import pytest
from datasets import Dataset, load_dataset
from huggingface_hub import DatasetCard, HfApi
from huggingface_hub.errors import HfHubHTTPError

from hf_circuit_sparsity import BinaryTask, load_task
from hf_circuit_sparsity.cli import main
from hf_circuit_sparsity.commands.hub_advice import hub_advice
from hf_circuit_sparsity.tasks.load import check_tasks
from tests.circuits.planted import on_off_task, word_tokenizer
from tests.tasks.own_tasks import rows

REPO = "ada/tasks"


@pytest.fixture(scope="module")
def words():
    return word_tokenizer()


def switch(words, name="switch", **options):
    return BinaryTask.from_dataset(
        Dataset.from_list(rows()), words, name, description="Which way?", **options
    )


def test_a_task_comes_back_with_its_rows_and_its_description(hub_server, words):
    task = switch(words)
    task.push_to_hub(REPO)
    assert HfApi().dataset_info(REPO).private
    for back in (
        load_task(f"{REPO}:switch", words),
        load_task(REPO, words),
        BinaryTask.from_pretrained(REPO, words, config_name="switch"),
    ):
        assert (back.name, back.text) == (task.name, task.text)
        assert back.train.to_list() == task.train.to_list()
        assert back.test.to_list() == task.test.to_list()
    assert BinaryTask.from_pretrained(REPO, words, name="mine").name == "mine"
    table = load_dataset(REPO, "switch")
    assert table["train"].to_list() == task.train.to_list()


def test_a_dataset_holds_several_and_each_push_is_one_commit(hub_server, words):
    first = switch(words).push_to_hub(REPO, private=False)
    on_off_task().push_to_hub(REPO)
    assert len(HfApi().list_repo_commits(REPO, repo_type="dataset")) == 3
    back = load_task(f"{REPO}:on_off", words)  # in which some pairs are there twice
    assert set(back.text.train) == set(on_off_task().text.train)
    assert load_task(f"{REPO}:switch", words).description == "Which way?"
    card = DatasetCard.load(REPO)
    assert {config["config_name"] for config in card.data.configs} == {"switch", "on_off"}
    assert "switch" in card.text and "on_off" in card.text
    for name in (REPO, f"{REPO}:no_such"):
        for call in (lambda: load_task(name, words), lambda: check_tasks([name])):  # noqa: B023
            with pytest.raises(ValueError, match=r"'on_off'.*'switch'|'switch'.*'on_off'"):
                call()
    with pytest.raises(ValueError, match="on_off"):
        BinaryTask.from_pretrained(REPO, words, config_name="on_off", revision=first.oid)


def test_a_persons_card_keeps_its_text(hub_server, words):
    HfApi().create_repo(REPO, repo_type="dataset")
    DatasetCard("---\nlicense: mit\n---\n\nMy own words.\n").push_to_hub(REPO)
    switch(words).push_to_hub(REPO)
    card = DatasetCard.load(REPO)
    assert card.text.strip() == "My own words." and card.data.license == "mit"
    assert load_task(f"{REPO}:switch", words).name == "switch"


def test_a_pull_request_and_a_branch(hub_server, words):
    HfApi().create_repo(REPO, repo_type="dataset")
    proposed = switch(words).push_to_hub(REPO, create_pr=True, commit_message="Try this")
    assert proposed.pr_revision and "switch" not in HfApi().list_repo_files(
        REPO, repo_type="dataset"
    )
    back = BinaryTask.from_pretrained(REPO, words, revision=proposed.pr_revision)
    assert back.text == switch(words).text


def test_any_dataset_with_the_columns_is_a_task(hub_server, words):
    Dataset.from_list(rows()).push_to_hub(REPO, config_name="mine")
    assert load_task(f"{REPO}:mine", words).text.train == switch(words, "mine").text.train
    Dataset.from_list(rows()).push_to_hub("ada/one")
    assert load_task("ada/one", words).name == "one"
    Dataset.from_dict({"text": ["a"]}).push_to_hub("ada/other")
    with pytest.raises(ValueError, match="prompt, target"):
        load_task("ada/other", words)


def test_a_built_in_name_on_the_hub_needs_another_name(hub_server, words):
    Dataset.from_list(rows()).push_to_hub(REPO, config_name="with_as")
    with pytest.raises(ValueError, match=r"with_as.*built-in"):
        load_task(f"{REPO}:with_as", words)
    mine = BinaryTask.from_pretrained(REPO, words, config_name="with_as", name="mine")
    assert mine.name == "mine" and len(mine.train)


def test_who_may_not(hub_server, words, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "")
    with pytest.raises(HfHubHTTPError) as refused:
        switch(words).push_to_hub(REPO)
    assert "hf auth login" in hub_advice(refused.value)
    for name in ("ada/nowhere", "ada/nowhere:mine"):
        assert main(["evaluate", "--model", "nowhere", "--task", name]) == 2
        error = capsys.readouterr().err
        assert "ada/nowhere" in error and "Traceback" not in error


def test_hostile_files_on_the_hub(hub_server, words):
    api = HfApi()
    api.create_repo(REPO, repo_type="dataset")
    for content, path in (
        (b"PAR1" + b"\x00" * 400, "train.parquet"),
        (b"\xff\xfe,\n", "train.csv"),
    ):
        api.upload_file(path_or_fileobj=content, path_in_repo=path, repo_id=REPO,
                        repo_type="dataset")  # fmt: skip
        with pytest.raises(ValueError, match=r"tasks"):
            load_task(REPO, words)
        api.delete_file(path, REPO, repo_type="dataset")
