"""The site builds without a broken link, and its reference has what the docstrings say."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import hf_circuit_sparsity

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_site_builds_strictly(tmp_path):
    for name in ("material", "mkdocstrings"):
        pytest.importorskip(name, reason="the extra [docs] is not installed")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "reference" / "index.html").read_text(encoding="utf-8")
    for name in hf_circuit_sparsity.__all__:
        assert f'id="hf_circuit_sparsity.{name}"' in page, name
    # A docstring was read, and its reference to another name is a link.
    assert "The nonzeros of any model" in page
    assert re.search(r'<a [^>]*href="#hf_circuit_sparsity.to_sparse"[^>]*><code>to_sparse', page)
    assert (tmp_path / "benchmarks" / "results" / "cpu" / "index.html").is_file()
