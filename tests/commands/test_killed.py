"""Runs that are killed again and again go on, and end as one that was not."""

import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from safetensors.torch import load_file

from hf_circuit_sparsity.trainer.checkpoints import UNFINISHED
from tests.commands.test_bridge import dense  # noqa: F401  a fixture
from tests.commands.test_cli import train_arguments

KILLS = 20


def killed_until_done(command: list[str], folder: Path, seed: int, most: int = KILLS) -> Counter:
    """Run a command again and again, killed while it starts, while it trains and while it saves.

    Args:
        folder: of a run with checkpoints, if it is to be killed in training or saving.
        most: how often to kill it.

    Returns:
        How often it was killed when.
    """
    draw, kills = random.Random(seed), Counter()
    while True:
        when = draw.choice(["starting", "training", "saving", "saving"])
        wait, before = draw.uniform(0.5, 5), {path.name for path in folder.glob("checkpoint-*")}
        began = time.monotonic()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        while process.poll() is None and kills.total() < most:
            saving = (folder / UNFINISHED).exists()
            if when == "training" and {p.name for p in folder.glob("checkpoint-*")} <= before:
                began = time.monotonic()  # not yet
            if saving if when == "saving" else time.monotonic() > began + wait:
                process.kill()
                kills[when] += 1
                break
            time.sleep(0.0005)
        output = process.communicate()[0].decode()
        if process.returncode == 0:
            return kills
        assert process.returncode == -9, output


@pytest.mark.slow
@pytest.mark.parametrize("sparsifier", ["topk", "rcd"])
def test_training_that_is_killed_ends_as_one_that_is_not(sparsifier, corpus, tmp_path):
    def command(folder: Path) -> list[str]:
        more = ["--max-steps", "1500", "--save-steps", "10", "--sparsifier", sparsifier,
                "--resume-from-checkpoint", "auto"]  # fmt: skip
        return [sys.executable, "-m", "hf_circuit_sparsity.cli",
                *train_arguments(corpus, folder, *more)]  # fmt: skip

    subprocess.run(command(tmp_path / "whole"), check=True, capture_output=True)
    kills = killed_until_done(command(tmp_path / "killed"), tmp_path / "killed", seed=1)
    assert kills.total() == KILLS and kills["saving"] >= 5
    found, expected = (load_file(tmp_path / f / "model.safetensors") for f in ("killed", "whole"))
    assert all((found[name] == tensor).all() for name, tensor in expected.items())
    assert sorted(p.name for p in (tmp_path / "killed").iterdir()) == sorted(
        p.name for p in (tmp_path / "whole").iterdir()
    )


CLI = [sys.executable, "-m", "hf_circuit_sparsity.cli"]


@pytest.mark.slow
def test_a_bridge_that_is_killed_ends_as_one_that_is_not(dense, corpus, tmp_path):  # noqa: F811
    def command(folder: Path) -> list[str]:
        return [
            *CLI, "bridge", "--dense-model", str(dense), "--output-dir", str(folder), "--corpus",
            str(corpus), "--block-size", "64", "--per-device-train-batch-size", "4",
            "--report-to", "none", "--use-cpu", "--max-steps", "200", "--save-steps", "10",
            "--resume-from-checkpoint", "auto",
        ]  # fmt: skip

    subprocess.run(command(tmp_path / "whole"), check=True, capture_output=True)
    kills = killed_until_done(command(tmp_path / "killed"), tmp_path / "killed", seed=1, most=4)
    assert kills.total() == 4
    for name in ("adapter_model.safetensors", "sparse/model.safetensors"):
        found, expected = (load_file(tmp_path / f / name) for f in ("killed", "whole"))
        assert all((found[key] == tensor).all() for key, tensor in expected.items())
