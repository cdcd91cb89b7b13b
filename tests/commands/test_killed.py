"""Runs that are killed again and again go on, and end as one that was not. Takes minutes."""

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from hf_circuit_sparsity.trainer.checkpoints import UNFINISHED
from tests.commands.test_cli import train_arguments

KILLS = 20


def killed_until_done(command: list[str], folder: Path, seed: int) -> tuple[int, int]:
    """Run a command, killed at random moments and, every other time, inside a save.

    Returns:
        How often it was killed, and how often of these while a checkpoint was unfinished.
    """
    draw, kills, inside = random.Random(seed), 0, 0
    while True:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        aimed, deadline = kills % 2 == 0, time.monotonic() + draw.uniform(4, 12)
        while process.poll() is None and kills < KILLS:
            unfinished = (folder / UNFINISHED).exists()
            if (aimed and unfinished) or time.monotonic() > deadline:
                inside += unfinished
                process.kill()
                kills += 1
                break
            time.sleep(0.001)
        output = process.communicate()[0].decode()
        if process.returncode == 0:
            return kills, inside
        assert process.returncode == -9, output


@pytest.mark.slow
@pytest.mark.parametrize("sparsifier", ["topk", "rcd"])
def test_training_that_is_killed_ends_as_one_that_is_not(sparsifier, corpus, tmp_path):
    def command(folder: Path) -> list[str]:
        more = ["--max-steps", "700", "--save-steps", "10", "--sparsifier", sparsifier,
                "--resume-from-checkpoint", "auto"]  # fmt: skip
        return [sys.executable, "-m", "hf_circuit_sparsity.cli",
                *train_arguments(corpus, folder, *more)]  # fmt: skip

    subprocess.run(command(tmp_path / "whole"), check=True, capture_output=True)
    kills, inside = killed_until_done(command(tmp_path / "killed"), tmp_path / "killed", seed=1)
    assert kills == KILLS and inside >= 5
    found, expected = (load_file(tmp_path / f / "model.safetensors") for f in ("killed", "whole"))
    assert all((found[name] == tensor).all() for name, tensor in expected.items())
    assert sorted(p.name for p in (tmp_path / "killed").iterdir()) == sorted(
        p.name for p in (tmp_path / "whole").iterdir()
    )
