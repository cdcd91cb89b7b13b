"""Where kernels cannot be compiled, everything runs without them."""

import os
import stat
import subprocess
import sys

import pytest

from hf_circuit_sparsity.kernels.cpu import load_kernels

ASK = """
import torch
from hf_circuit_sparsity.kernels.cpu import load_kernels
from hf_circuit_sparsity.modeling.functional import abs_topk
print(load_kernels() is not None, abs_topk(torch.tensor([[1.0, -3.0, 2.0]]), 2).tolist())
"""
RESULT = "[[0.0, -3.0, 2.0]]"


def ask(**environment):
    return subprocess.run(
        [sys.executable, "-c", ASK],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_switched_off():
    assert ask(HF_CIRCUIT_SPARSITY_KERNELS="0").stdout.strip() == f"False {RESULT}"


def test_compiler_that_fails_is_named_once_and_done_without(tmp_path):
    broken = tmp_path / "broken-cc"
    broken.write_text("#!/bin/sh\necho no such luck >&2\nexit 1\n")
    broken.chmod(broken.stat().st_mode | stat.S_IXUSR)
    answer = ask(CC=str(broken), XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert answer.stdout.strip() == f"False {RESULT}"
    assert answer.stderr.count("no such luck") == 1 and "broken-cc" in answer.stderr
    assert not list((tmp_path / "cache" / "hf_circuit_sparsity").iterdir())  # nothing half-made


@pytest.mark.skipif(load_kernels() is None, reason="no C compiler, or switched off")
def test_compiled_once_and_kept(tmp_path):
    folder = tmp_path / "hf_circuit_sparsity"
    assert ask(XDG_CACHE_HOME=str(tmp_path)).stdout.strip() == f"True {RESULT}"
    (library,) = folder.iterdir()
    made = library.stat().st_mtime_ns
    assert ask(XDG_CACHE_HOME=str(tmp_path)).stdout.strip() == f"True {RESULT}"
    assert [p.stat().st_mtime_ns for p in folder.iterdir()] == [made]
