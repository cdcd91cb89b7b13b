"""Datasets of tasks: one configuration per task, there and back."""

import pytest
from datasets import get_dataset_config_names, load_dataset
from huggingface_hub import DatasetCard

from hf_circuit_sparsity import build_task_datasets, load_task, tokenizer_from_openai
from hf_circuit_sparsity.tasks.binary_task import FEATURES
from tests.conftest import FIXTURES

NAMES = ["single_double_quote", "bracket_counting"]
ROWS = {"n_train": 40, "n_test": 16}


@pytest.fixture
def tokenizer():
    return tokenizer_from_openai(FIXTURES / "tokenizer")


def test_one_configuration_per_task(hub_server, tokenizer):
    built = build_task_datasets(tokenizer, NAMES, **ROWS)
    for name, splits in built.items():
        splits.push_to_hub("ada/tasks", config_name=name, private=True)
    assert sorted(get_dataset_config_names("ada/tasks")) == sorted(NAMES)
    for name in NAMES:
        back = load_dataset("ada/tasks", name)
        assert {split: len(rows) for split, rows in back.items()} == {"train": 40, "test": 16}
        for split, rows in back.items():
            assert rows.features == FEATURES
            assert rows.to_list() == built[name][split].to_list()
            # A person who looks at the table reads text first.
            assert rows.column_names[:4] == [
                "prompt", "counterfactual_prompt", "target", "counterfactual_target",
            ]  # fmt: skip
    task = load_task("bracket_counting", tokenizer, **ROWS)
    assert load_dataset("ada/tasks", "bracket_counting")["test"][3] == task.test[3]

    # What the viewer reads is on the card.
    data = DatasetCard.load("ada/tasks").data.to_dict()
    assert sorted(config["config_name"] for config in data["configs"]) == sorted(NAMES)
    for info in data["dataset_info"]:
        types = {feature["name"]: feature for feature in info["features"]}
        assert types["prompt"]["dtype"] == "string" and types["target_id"]["dtype"] == "int32"
        assert types["input_ids"]["list"] == "int32"
