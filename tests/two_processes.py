"""A training script on two processes of this machine."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import torch

_ROOT = Path(__file__).parents[1]


def launch(script: str, folder: Path, *arguments: str, processes: int = 2) -> list[Any]:
    """Run it by `accelerate launch`, with `folder` and `arguments`; what each rank saved there.

    With `--cpu` Accelerate 1.15 starts one process whatever `--num_processes` says; with
    `--multi_gpu` and ACCELERATE_USE_CPU it starts all, on the CPU.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "train.py"
    file.write_text(textwrap.dedent(script), encoding="utf-8")
    paths = os.pathsep.join(map(str, (_ROOT, _ROOT / "loopback_hub" / "src")))
    environment = {
        **os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"
    }  # fmt: skip
    command = [sys.executable, "-m", "accelerate.commands.launch",
               *(["--multi_gpu"] if processes > 1 else []),
               "--num_processes", str(processes), "--num_machines", "1",
               "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
               str(file), str(folder), *arguments]  # fmt: skip
    subprocess.run(command, check=True, env=environment, timeout=600)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(processes)]


def launch_and_resume(script: str, folder: Path, *arguments: str) -> list[Any]:
    """As [`launch`]; the same run taken up at its third step must end alike, and so must ranks."""
    runs = launch(script, folder / "whole", *arguments)
    runs += launch(script, folder / "again", *arguments, str(folder / "whole" / "checkpoint-3"))
    for other in runs[1:]:
        for name, value in runs[0]["weights"].items():
            assert torch.equal(value, other["weights"][name]), name
    return runs[:2]
