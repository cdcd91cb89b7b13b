"""Runs that were killed, whose disk was full, or that find the checkpoints of others."""

import errno
import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback
from transformers.trainer import OPTIMIZER_NAME, TRAINER_STATE_NAME

from hf_circuit_sparsity.trainer.checkpoints import (
    RUN_NAME,
    UNFINISHED,
    WholeCheckpoints,
    last_whole_checkpoint,
    problem_of,
)
from tests.trainer.runs import assert_same_run

EVERY_FOUR = {"save_strategy": "steps", "save_steps": 4}


class Killed(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


class EndAtEight(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step == 8


def names(trainer):
    """What lies in its folder beside the note of whose it is."""
    found = {path.name for path in Path(trainer.args.output_dir).iterdir()}
    assert RUN_NAME in found
    return sorted(found - {RUN_NAME})


@pytest.fixture
def first_part(make_gpt2, make_trainer):
    """A trainer whose run was stopped after step 8, with two checkpoints."""
    trainer = make_trainer(make_gpt2(), callbacks=[EndAtEight()], **EVERY_FOUR)
    trainer.train()
    assert names(trainer) == ["checkpoint-4", "checkpoint-8"]
    return trainer


@pytest.mark.parametrize("where", ["_save_optimizer_and_scheduler", "_save_rng_state", "_save"])
@pytest.mark.parametrize("sparsifier", ["topk", "rcd"])
def test_a_run_killed_inside_a_save_goes_on_from_the_one_before(
    where, sparsifier, make_gpt2, make_trainer, monkeypatch
):
    settings = {**EVERY_FOUR, "sparsifier": sparsifier}
    whole = make_trainer(make_gpt2(), name="whole", **settings)
    whole.train()
    killed = make_trainer(make_gpt2(), **settings)
    save = getattr(killed, where)

    def kill(folder, *args):
        save(folder, *args)
        if killed.state.global_step == 8:
            raise Killed

    monkeypatch.setattr(killed, where, kill)
    with pytest.raises(Killed):
        killed.train()
    assert names(killed) == [UNFINISHED, "checkpoint-4"]
    resumed = make_trainer(make_gpt2(seed=5), **settings)
    resumed.train(resume_from_checkpoint=True)
    assert_same_run(whole, resumed)
    assert names(resumed) == ["checkpoint-12", "checkpoint-4", "checkpoint-8"]


def damage(checkpoint, kind):
    if kind == "empty":
        for path in checkpoint.iterdir():
            path.unlink()
        return "it has no trainer_state.json"
    if kind == "no weights":  # but the arguments, which are a .bin as well
        (checkpoint / "model.safetensors").unlink()
        assert (checkpoint / "training_args.bin").is_file()
        return "it has no weights"
    name = {"weights": "model.safetensors", "optimizer": OPTIMIZER_NAME,
            "state": TRAINER_STATE_NAME}[kind]  # fmt: skip
    content = (checkpoint / name).read_bytes()
    (checkpoint / name).write_bytes(content[: len(content) // 2])
    return f"its {name} is damaged"


@pytest.mark.parametrize("kind", ["empty", "weights", "no weights", "optimizer", "state"])
def test_what_is_not_whole_is_passed_over_by_name(
    kind, first_part, make_gpt2, make_trainer, caplog
):
    checkpoint = Path(first_part.args.output_dir) / "checkpoint-8"
    problem = damage(checkpoint, kind)
    assert problem in problem_of(checkpoint)
    again = make_trainer(make_gpt2(seed=5), **EVERY_FOUR)
    with pytest.raises(ValueError, match="checkpoint-8.*" + problem):
        again.train(resume_from_checkpoint=str(checkpoint))
    assert again.state.global_step == 0
    said = []
    before = last_whole_checkpoint(checkpoint.parent, said.append)
    assert before == str(checkpoint.with_name("checkpoint-4"))
    assert len(said) == 1 and str(checkpoint) in said[0] and problem in said[0]
    with caplog.at_level(logging.WARNING):
        again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 12 and problem in caplog.text
    assert problem_of(checkpoint) is None  # written anew on the way


def test_a_folder_without_any_is_said(make_gpt2, make_trainer, tmp_path):
    with pytest.raises(ValueError, match="no whole checkpoint"):
        make_trainer(make_gpt2()).train(resume_from_checkpoint=True)
    assert last_whole_checkpoint(tmp_path / "nowhere") is None
    with pytest.raises(ValueError, match="no such folder"):
        make_trainer(make_gpt2()).train(resume_from_checkpoint=str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("fields", "settings", "said"),
    [
        ({}, {"seed": 4}, "its seed is 3, this run's is 4"),
        ({"n_head": 1}, {}, "its model is"),
        ({}, {"max_steps": 6}, "its step is 8 of 6"),
    ],
)
def test_another_runs_checkpoint_is_taken_only_if_it_is_named(
    fields, settings, said, first_part, make_gpt2, make_trainer, caplog
):
    other = make_trainer(make_gpt2(**fields), **{**EVERY_FOUR, **settings})
    with pytest.raises(ValueError, match=f"checkpoint-8 is of another run: {said}"):
        other.train(resume_from_checkpoint=True)
    checkpoint = str(Path(first_part.args.output_dir) / "checkpoint-8")
    with caplog.at_level(logging.WARNING):
        other.train(resume_from_checkpoint=checkpoint)
    assert said in caplog.text and other.state.global_step >= 8


def test_other_data_and_other_processes_are_noticed(
    first_part, make_gpt2, make_trainer, dataset, caplog
):
    other = make_trainer(make_gpt2(), **EVERY_FOUR)
    other.train_dataset = dataset.select(range(40))
    with pytest.raises(ValueError, match="its data is"):
        other.train(resume_from_checkpoint=True)
    same = make_trainer(make_gpt2(), **EVERY_FOUR)
    path = Path(first_part.args.output_dir) / "checkpoint-8" / RUN_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), "processes": 2}))
    with caplog.at_level(logging.WARNING):
        same.train(resume_from_checkpoint=True)
    assert "saved by 2 processes and goes on with 1" in caplog.text


def test_one_of_an_earlier_release_says_nothing_of_its_run(first_part, make_gpt2, make_trainer):
    (Path(first_part.args.output_dir) / "checkpoint-8" / RUN_NAME).unlink()
    other = make_trainer(make_gpt2(), **{**EVERY_FOUR, "seed": 4})
    other.train(resume_from_checkpoint=True)
    assert other.state.global_step == 12


def test_longer_runs_may_go_on_and_new_ones_say_what_is_there(
    first_part, make_gpt2, make_trainer, caplog
):
    longer = make_trainer(make_gpt2(), **{**EVERY_FOUR, "max_steps": 16})
    longer.train(resume_from_checkpoint=True)
    assert longer.state.global_step == 16
    with caplog.at_level(logging.WARNING):
        make_trainer(make_gpt2(), **EVERY_FOUR).train()
    assert "checkpoint-16 of an earlier run; this one starts anew" in caplog.text


def test_the_folder_is_that_of_the_run_that_began_last(first_part, make_gpt2, make_trainer):
    anew = make_trainer(make_gpt2(), callbacks=[EndAtEight()], **{**EVERY_FOUR, "save_steps": 6})
    anew.train()  # its only checkpoint is older than the other's last
    folder, said = anew.args.output_dir, []
    assert last_whole_checkpoint(folder, said.append) == str(Path(folder) / "checkpoint-6")
    assert "checkpoint-8 is passed over: it is of an earlier run" in said[0]
    resumed = make_trainer(make_gpt2(seed=5), **EVERY_FOUR)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 12
    assert last_whole_checkpoint(folder) == str(Path(folder) / "checkpoint-12")


def test_a_full_disk_leaves_what_was_saved(make_gpt2, make_trainer, monkeypatch):
    whole = make_trainer(make_gpt2(), name="whole", **EVERY_FOUR)
    whole.train()
    trainer = make_trainer(make_gpt2(), **EVERY_FOUR)
    write = torch.save

    def full(*args, **kwargs):
        if trainer.state.global_step == 8:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(*args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"no room for .*checkpoint-8 .*make room and resume"):
        trainer.train()
    assert names(trainer) == ["checkpoint-4"]
    monkeypatch.setattr(torch, "save", write)
    resumed = make_trainer(make_gpt2(seed=5), **EVERY_FOUR)
    resumed.train(resume_from_checkpoint=True)
    assert_same_run(whole, resumed)


def test_more_epochs_may_be_asked_for(make_gpt2, make_trainer):
    settings = {**EVERY_FOUR, "max_steps": -1}
    make_trainer(make_gpt2(), num_train_epochs=1, **settings).train()
    longer = make_trainer(make_gpt2(), num_train_epochs=2, **settings)
    longer.train(resume_from_checkpoint=True)
    assert longer.state.epoch == 2


def test_a_run_that_is_done_gives_its_best_model_again(make_gpt2, make_trainer):
    settings = {
        "save_strategy": "steps", "eval_strategy": "steps", "save_steps": 2, "eval_steps": 2,
        "load_best_model_at_end": True, "metric_for_best_model": "loss",
        "greater_is_better": True,  # the worst, so that it is not the last
    }  # fmt: skip
    whole = make_trainer(make_gpt2(), **settings)
    whole.train()
    assert not whole.state.best_model_checkpoint.endswith("checkpoint-12")
    again = make_trainer(make_gpt2(seed=5), **settings)
    again.train(resume_from_checkpoint=True)
    for p, q in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_the_best_model_and_the_limit_are_of_where_checkpoints_are(make_gpt2, make_trainer):
    trainer = make_trainer(
        make_gpt2(), save_strategy="steps", eval_strategy="steps", save_steps=2, eval_steps=2,
        save_total_limit=2, load_best_model_at_end=True, metric_for_best_model="loss",
    )  # fmt: skip
    trainer.train()
    kept = names(trainer)
    assert len(kept) == 2 and "checkpoint-12" in kept
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name in kept and best.parent == Path(trainer.args.output_dir)
    state = json.loads((best / TRAINER_STATE_NAME).read_text())
    assert state["best_model_checkpoint"] == str(best)


@pytest.mark.parametrize("settings", [{}, {"max_steps": -1, "num_train_epochs": 1}])
def test_a_run_whose_last_step_was_saved_trains_no_more(settings, make_gpt2, make_trainer, caplog):
    settings = {**EVERY_FOUR, **settings}
    whole = make_trainer(make_gpt2(), **settings)
    whole.train()
    again = make_trainer(make_gpt2(seed=5), **settings)
    with caplog.at_level(logging.WARNING):
        output = again.train(resume_from_checkpoint=True)
    assert output.global_step == again.state.global_step == whole.state.global_step
    assert "nothing is left to train" in caplog.text
    for p, q in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_run_killed_as_it_lets_go_of_its_oldest_checkpoint(make_gpt2, make_trainer, monkeypatch):
    settings = {**EVERY_FOUR, "save_total_limit": 1}
    trainer = make_trainer(make_gpt2(), **settings)

    def killed(folder, *more):
        if len(list(folder.glob("checkpoint-*"))) > 1 and trainer.state.global_step == 12:
            raise Killed
        WholeCheckpoints._let_go_of_the_oldest(trainer, folder)

    monkeypatch.setattr(trainer, "_let_go_of_the_oldest", killed)
    with pytest.raises(Killed):
        trainer.train()
    assert {"checkpoint-8", "checkpoint-12"} < set(names(trainer))
    (Path(trainer.args.output_dir) / ".tmpX1y2Z3").write_text("what safetensors was writing")
    trainer = make_trainer(make_gpt2(), **settings)
    trainer.train(resume_from_checkpoint=True)
    assert names(trainer) == ["checkpoint-12"]


def test_a_checkpoint_that_is_let_go_of_is_never_half_there(make_gpt2, make_trainer, monkeypatch):
    trainer = make_trainer(make_gpt2(), **EVERY_FOUR, save_total_limit=1)

    def killed(path, *args, **kwargs):
        if (Path(path) / "old-checkpoint-4").exists():
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(shutil, "rmtree", killed)
        trainer.train()
    assert names(trainer) == [UNFINISHED, "checkpoint-8"]
