"""The Triton kernels on a GPU or, where there is none, in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


def test_triton_kernels():
    """In a process of their own: Triton reads the switch of its interpreter when it is imported."""
    pytest.importorskip("triton", reason="Triton is not installed (the extra `gpu`)")
    switch = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    cases = Path(__file__).with_name("triton_cases.py")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(cases)]
    run = subprocess.run(command, env=os.environ | switch, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
