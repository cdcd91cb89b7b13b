"""Where kernels cannot be compiled, everything runs without them."""

import os
import stat
import subprocess
import sys

import pytest
import torch
from transformers.testing_utils import CaptureLogger

from hf_circuit_sparsity.kernels import compile as compiling
from hf_circuit_sparsity.kernels.cpu import load_kernels
from hf_circuit_sparsity.modeling.functional import abs_topk

ASK = """
import torch
from hf_circuit_sparsity.kernels.cpu import load_kernels
from hf_circuit_sparsity.modeling.functional import abs_topk
print(load_kernels() is not None, abs_topk(torch.tensor([[1.0, -3.0, 2.0]]), 2).tolist())
"""


@pytest.fixture
def are_loaded(monkeypatch):
    """Whether there are kernels under other variables of the environment; selects with them."""

    def ask(**environment: str) -> bool:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        load_kernels.cache_clear()
        answer = load_kernels() is not None
        assert abs_topk(torch.tensor([[1.0, -3.0, 2.0]]), 2).tolist() == [[0.0, -3.0, 2.0]]
        return answer

    yield ask
    monkeypatch.undo()
    load_kernels.cache_clear()


def test_switched_off(are_loaded):
    assert not are_loaded(HF_CIRCUIT_SPARSITY_KERNELS="0")


def test_compiler_that_fails_is_named_once_and_done_without(are_loaded, tmp_path):
    broken = tmp_path / "broken-cc"
    broken.write_text("#!/bin/sh\necho no such luck >&2\nexit 1\n")
    broken.chmod(broken.stat().st_mode | stat.S_IXUSR)
    with CaptureLogger(compiling.logger) as said:
        assert not are_loaded(CC=str(broken), XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert said.out.count("no such luck") == 1 and "broken-cc" in said.out
    assert not list((tmp_path / "cache" / "hf_circuit_sparsity").iterdir())  # nothing half-made


@pytest.mark.skipif(load_kernels() is None, reason="no C compiler, or switched off")
def test_compiled_once_and_kept(are_loaded, tmp_path):
    folder = tmp_path / "hf_circuit_sparsity"
    assert are_loaded(XDG_CACHE_HOME=str(tmp_path))
    (library,) = folder.iterdir()
    made = library.stat().st_mtime_ns
    # A process of its own comes to the same name.
    again = subprocess.run(
        [sys.executable, "-c", ASK], env=dict(os.environ), capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert again.stdout.strip() == "True [[0.0, -3.0, 2.0]]"
    assert [p.stat().st_mtime_ns for p in folder.iterdir()] == [made]
