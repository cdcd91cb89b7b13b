"""The kernels as they are compiled for older processors, against torch and numpy without them.

In a process for each: the C compiler is told of an older processor, and torch, oneDNN and MKL to
use no newer instructions. What this machine's memory and clock give stays what it is.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from hf_circuit_sparsity.kernels.cpu import without_kernels

from ..experiment import Experiment, table
from .threads import work
from .timing import interleaved, main, ratio, settings

ROOT = Path(__file__).parents[2]
SETS = {
    "this processor's": ("native", "", ""),
    "AVX2": ("x86-64-v3", "avx2", "AVX2"),
    "SSE2": ("x86-64", "default", "SSE41"),
}
"""Name → what the compiler, torch, and oneDNN and MKL call it."""


def run(experiment: Experiment) -> str:
    """A row for every kind of work on every set of instructions."""
    device, _, quick = settings(experiment)
    if device != "cpu" or platform.machine().lower() not in ("x86_64", "amd64"):
        raise SystemExit("instruction_sets measures CPUs of the x86-64 family.")
    return table([row for name in SETS for row in _measured(name, quick)])


def _measured(name: str, quick: bool) -> list[dict[str, str]]:
    architecture, for_torch, for_libraries = SETS[name]
    with tempfile.TemporaryDirectory() as folder:
        compiler = Path(folder, "cc")
        compiler.write_text(f'#!/bin/sh\nexec cc "$@" -march={architecture}\n')
        compiler.chmod(0o755)
        environment = {**os.environ, "CC": str(compiler), "XDG_CACHE_HOME": folder}
        environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())
        if for_torch:
            environment["ATEN_CPU_CAPABILITY"] = for_torch
            environment["ONEDNN_MAX_CPU_ISA"] = for_libraries
            environment["MKL_ENABLE_INSTRUCTIONS"] = for_libraries.replace("SSE41", "SSE4_2")
        code = f"from benchmarks.speed.instruction_sets import measure; measure({name!r}, {quick})"
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, cwd=ROOT, check=True,
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def measure(name: str, quick: bool) -> None:
    """Print, as JSON, the rows of the instructions that this process has."""
    rows = []
    for what, call in work("cpu", torch.float32, quick).items():
        sides = {"with": call, "without": partial(_without_kernels, call)}
        times = interleaved(sides, 3)
        rows.append({
            "instructions": name,
            "what": what,
            "with kernels: ms": str(times["with"]),
            "without": str(times["without"]),
            "without / with": ratio(times["without"], times["with"]),
        })  # fmt: skip
    print(json.dumps(rows))


def _without_kernels(call: Callable[[], object]) -> None:
    with without_kernels():
        call()


if __name__ == "__main__":
    main(run, __doc__, "instruction_sets")
