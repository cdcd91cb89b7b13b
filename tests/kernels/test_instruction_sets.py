"""Kernels compiled for other processors than this one, held against the same references.

How many numbers a vector of theirs has, and what transposes and sums vectors, is another code on
processors with AVX-512, with AVX2 and without either.
"""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from hf_circuit_sparsity.kernels.compile import _processor
from hf_circuit_sparsity.kernels.cpu import load_kernels

TESTS = (
    "kernels/test_cpu.py", "kernels/test_gates.py", "modeling/test_csr.py",
    "modeling/test_attention.py", "modeling/test_blocks.py",
)  # fmt: skip


@pytest.mark.skipif(load_kernels() is None, reason="no C compiler, or switched off")
@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="not for x86")
@pytest.mark.parametrize(("architecture", "needs"), [("x86-64-v3", "avx2"), ("x86-64", "sse2")])
def test_gives_the_same(architecture, needs, tmp_path):
    if needs not in _processor():
        pytest.skip(f"this processor has no {needs}")
    compiler, used = tmp_path / "cc", tmp_path / "used"
    compiler.write_text(f'#!/bin/sh\ntouch {used}\nexec cc "$@" -march={architecture}\n')
    compiler.chmod(0o755)
    environment = {**os.environ, "CC": str(compiler), "XDG_CACHE_HOME": str(tmp_path)}
    tests = [str(Path(__file__).parents[1] / name) for name in TESTS]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests],
        env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    assert used.exists() and list(tmp_path.glob("hf_circuit_sparsity/kernels-*.so"))
