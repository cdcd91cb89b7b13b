"""Folders that cannot be written into, numbers that break, processes that are killed."""

import errno
import importlib
import os
import signal
import subprocess
import sys
import tempfile

import pytest
import torch
from transformers.trainer import OPTIMIZER_NAME

from hf_circuit_sparsity.cli import main
from hf_circuit_sparsity.commands import quickstart, training
from hf_circuit_sparsity.commands.training import fit
from hf_circuit_sparsity.files import check_can_write, scratch_folder
from hf_circuit_sparsity.optim.topk_adamw import TopKAdamW
from tests.commands.test_cli import train_arguments

# Command → the function in its module that does the first of its work.
COMMANDS = {
    "prune --model {saved} --task with_as --output-dir": ("prune", "load_model"),
    "prune --model {saved} --task with_as --trials 2 --output-dir": ("prune", "load_model"),
    "evaluate --model {saved} --output-dir": ("evaluate", "load_model"),
    "verify {circuit} --output-dir": ("verify", "load_circuit"),
    "view {circuit} --output-dir": ("view", "load_circuit"),
    "quickstart --output-dir": ("quickstart", "read_corpus"),
    "train --output-dir": ("train", "read_corpus"),
    "bridge --dense-model {saved} --output-dir": ("bridge", "build_bridge"),
}


def work(*args, **kwargs):
    raise AssertionError("the work began")


def read_only(*args, **kwargs):
    raise OSError(errno.EROFS, "Read-only file system")


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", ["a file", "read-only"])
def test_a_folder_that_takes_no_file_is_met_before_the_work(
    kind, command, saved, saved_circuit, tmp_path, monkeypatch, capsys
):
    name, first = COMMANDS[command]
    module = importlib.import_module(f"hf_circuit_sparsity.commands.{name}")
    monkeypatch.setattr(module, first, work)
    output = tmp_path / "letter" / "out"
    if kind == "a file":
        output.parent.write_text("dear")
    else:
        monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    before = sorted(tmp_path.rglob("*"))
    arguments = command.format(saved=saved, circuit=saved_circuit).split()
    assert main([*arguments, str(output)]) == 2
    error = capsys.readouterr().err
    assert str(output) in error and "Traceback" not in error and error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_publish_meets_a_folder_for_temporary_files_before_the_work(saved, monkeypatch, capsys):
    module = importlib.import_module("hf_circuit_sparsity.commands.publish")
    monkeypatch.setattr(module, "read_run", work)
    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    assert main(["publish", str(saved), "--repo", "ada/x", "--dry-run"]) == 2
    assert tempfile.gettempdir() in capsys.readouterr().err


def test_a_folder_that_can_be_made_is_not(tmp_path):
    check_can_write(tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())


def test_gradients_that_stay_infinite_are_one_sentence(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(TopKAdamW, "_measure_gradients", lambda self: float("inf"))
    assert main(train_arguments(corpus, tmp_path / "run", "--max-steps", "9")) == 2
    error = capsys.readouterr().err
    assert "not finite" in error and "Traceback" not in error


@pytest.mark.parametrize(
    "command",
    [c for c in COMMANDS if c.startswith(("prune", "quickstart", "verify"))] + ["publish"],
)
def test_what_a_scheduler_sends_stops_a_command_as_ctrl_c_does(
    command, saved, saved_circuit, tmp_path, monkeypatch, capsys
):
    arguments = f"{command} {tmp_path / 'out'}".format(saved=saved, circuit=saved_circuit).split()
    name, first = COMMANDS.get(command, ("publish", "read_run"))
    if name == "publish":
        arguments = ["publish", str(saved), "--repo", "ada/x"]
    module = importlib.import_module(f"hf_circuit_sparsity.commands.{name}")
    monkeypatch.setattr(module, first, lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    assert main(arguments) == 130
    assert "Stopped" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_quickstart_killed_before_it_trains_goes_on(corpus, tmp_path, monkeypatch):
    """It has learned its tokens by then, and is about to see how fast this machine is."""

    def killed(*args):
        raise KeyboardInterrupt

    def no_learning(*args, **kwargs):
        raise AssertionError("the tokens are learned anew")

    folder = tmp_path / "q"
    folder.mkdir()
    (folder / ".quickstart.tmp.json").write_text("{")  # of one that was killed even before
    monkeypatch.setattr(quickstart, "_seconds_per_step", killed)
    arguments = ["quickstart", "--minutes", "1", "--output-dir", str(folder)]
    for _ in range(2):
        assert main([*arguments, "--corpus", str(corpus)]) == 130
        assert {path.name for path in folder.iterdir()} == {"quickstart.json", "tokenizer"}
        monkeypatch.setattr(training, "train_tokenizer", no_learning)


def test_a_folder_for_temporary_files_outlives_no_process(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code = """
import os
from hf_circuit_sparsity.files import scratch_folder
with scratch_folder("ours-") as folder:
    (folder / "weights").write_text("many")
    os._exit(9)
"""
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 9
    (left,) = tmp_path.iterdir()
    with scratch_folder("ours-") as folder, scratch_folder("ours-") as other:
        assert set(tmp_path.iterdir()) == {folder, other} and left not in (folder, other)
        assert not list(folder.iterdir())
    assert not list(tmp_path.iterdir())


class Killed(torch.utils.data.Dataset):
    """Rows of which one kills who reads it."""

    def __len__(self):
        return 32

    def __getitem__(self, index):
        if torch.utils.data.get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return {"input_ids": list(range(12)), "labels": list(range(12))}


def test_a_worker_that_is_killed_is_one_sentence(tiny_model, make_trainer):
    trainer = make_trainer(tiny_model, dataloader_num_workers=1)
    trainer.train_dataset = Killed()
    with pytest.raises(ChildProcessError, match="--dataloader-num-workers"):
        fit(trainer, 12)


@pytest.mark.parametrize("name", [OPTIMIZER_NAME, "scheduler.pt", "rng_state.pth"])
@pytest.mark.parametrize("sparsifier", ["topk", "rcd"])
def test_a_file_of_a_checkpoint_that_is_damaged_inside_is_one_sentence(
    sparsifier, name, tiny_model, make_trainer
):
    settings = {"save_strategy": "steps", "save_steps": 2, "sparsifier": sparsifier}
    trainer = make_trainer(tiny_model, max_steps=4, **settings)
    trainer.train()
    path = f"{trainer.args.output_dir}/checkpoint-2/{name}"
    with open(path, "r+b") as file:  # at its end it stays an archive
        file.write(bytes(300))
    trainer = make_trainer(tiny_model, max_steps=4, **settings)
    with pytest.raises(ValueError, match="checkpoint-2"):
        trainer.train(resume_from_checkpoint=os.path.dirname(path))
