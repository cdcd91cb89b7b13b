"""Searching the settings."""

import fcntl
import json

import pytest

from hf_circuit_sparsity import PruningConfig, search_circuit
from hf_circuit_sparsity.circuits.pruning.tune import LOCK_NAME
from tests.circuits.planted import on_off_task, planted_model, reference_ids
from tests.circuits.pruning.conftest import QUICKER


def search(folder, trials, **settings):
    return search_circuit(
        planted_model(), on_off_task(), PruningConfig(**{**QUICKER.__dict__, **settings}),
        trials=trials, folder=folder, reference=reference_ids(), progress=False,
    )  # fmt: skip


def values(folder):
    lines = [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]
    return [
        (line["param_name"], line["param_value_internal"]) for line in lines if "param_name" in line
    ]


def test_a_search_that_was_stopped_goes_the_way_it_would_have_gone(tmp_path):
    whole = search(tmp_path / "whole", 3)
    search(tmp_path / "cut", 1)
    cut = search(tmp_path / "cut", 3)
    assert values(tmp_path / "cut") == values(tmp_path / "whole")
    assert len(values(tmp_path / "whole")) == 3 * 7
    assert cut.nodes == whole.nodes and cut.metrics == whole.metrics
    # Trials that are there are not run again.
    before = (tmp_path / "cut" / "trials.jsonl").read_bytes()
    search(tmp_path / "cut", 2)
    assert values(tmp_path / "cut") == values(tmp_path / "whole")
    assert (tmp_path / "cut" / "trials.jsonl").read_bytes()[: len(before)] == before

    with pytest.raises(ValueError, match="max_steps=20"):
        search(tmp_path / "cut", 3, max_steps=21)
    with pytest.raises(ValueError, match="trials=0"):
        search(tmp_path / "none", 0)
    assert not (tmp_path / "none").exists()


def test_what_a_killed_search_leaves_behind_is_no_obstacle(tmp_path):
    whole = search(tmp_path / "whole", 2)
    cut = tmp_path / "cut"
    search(cut, 1)
    # A lock as optuna's own, which pointed nowhere and was waited for; and half a line.
    (cut / "trials.jsonl.lock").symlink_to("cut/trials.jsonl")
    with (cut / "trials.jsonl").open("a") as journal:
        journal.write('{"op_code": 4, "worker_id": "half a li')
    assert search(cut, 2).nodes == whole.nodes
    assert values(cut) == values(tmp_path / "whole")


def test_two_searches_in_one_folder_are_refused(tmp_path):
    search(tmp_path, 1)
    with (tmp_path / LOCK_NAME).open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another process is searching"):
            search(tmp_path, 2)
    search(tmp_path, 2)
