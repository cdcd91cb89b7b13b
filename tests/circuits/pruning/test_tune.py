"""Searching the settings."""

import fcntl
import json
import os
from pathlib import Path

import optuna
import pytest

from hf_circuit_sparsity import PruningConfig, search_circuit
from hf_circuit_sparsity.circuits.circuit_file import JSON_NAME
from hf_circuit_sparsity.circuits.pruning.tune import BEST_NAME, LOCK_NAME
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


class Killed(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


def test_a_search_killed_while_it_saves_the_smallest_finds_it_again(tmp_path, monkeypatch):
    whole, cut = search(tmp_path / "whole", 2), tmp_path / "cut"
    replace = os.replace

    def killed(source, target):
        if Path(target).name == JSON_NAME:
            raise Killed
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "replace", killed)
        search(cut, 2)
    assert (cut / BEST_NAME).is_dir() and not (cut / BEST_NAME / JSON_NAME).exists()
    assert search(cut, 2).nodes == whole.nodes
    # The trial that was killed has drawn its settings too.
    assert values(cut) == values(cut)[:7] + values(tmp_path / "whole")


def test_a_search_killed_before_its_first_trial_begins_with_it_once(tmp_path, monkeypatch):
    def killed(*args, **kwargs):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(optuna.Study, "optimize", killed)
        search(tmp_path, 2)
    search(tmp_path, 2)
    found = values(tmp_path)
    assert len(found) == 2 * 7 and found[:7] != found[7:]


def test_two_searches_in_one_folder_are_refused(tmp_path):
    search(tmp_path, 1)
    with (tmp_path / LOCK_NAME).open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another process is searching"):
            search(tmp_path, 2)
    search(tmp_path, 2)
