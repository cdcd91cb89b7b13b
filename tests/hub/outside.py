"""A process that has never heard of this package: what others see of what was pushed."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

_FORBID = """
import sys


class Forbidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_circuit_sparsity":
            raise ModuleNotFoundError("hf_circuit_sparsity is not installed here")


sys.meta_path.insert(0, Forbidden())
sys.path = [p for p in sys.path if p not in ("", ROOT)]
"""


def run_outside(code: str, folder: Path, *, forbid: bool = True, **environment: str) -> str:
    """Run code in a process of its own, in an empty folder; returns what it printed.

    Args:
        code: Python.
        folder: for the script; it becomes the working directory.
        forbid: let every import of this package fail. The environment has it installed, so it is
            not enough to be elsewhere.
        environment: further variables.
    """
    root = str(Path(__file__).parents[2])
    script = folder / "outside.py"
    before = _FORBID.replace("ROOT", repr(root)) if forbid else ""
    script.write_text(before + textwrap.dedent(code))
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, **({} if forbid else {"PYTHONPATH": root}), **environment},
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
