"""The README's example runs as printed, at the size of a test."""

import re
import shutil
import sysconfig
from pathlib import Path

import pytest

from hf_circuit_sparsity import TaskNotLearnedError

README = Path(__file__).parents[1] / "README.md"


def test_the_api_example_runs(tmp_path, monkeypatch):
    example, *_ = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    for name in ("argparse", "dataclasses", "inspect", "typing"):
        shutil.copy(Path(sysconfig.get_path("stdlib")) / f"{name}.py", tmp_path)
    for printed, small in {
        "build_corpus()  ": f"build_corpus({str(tmp_path)!r})  ",
        "max_steps=2500": "max_steps=2",
    }.items():
        assert printed in example
        example = example.replace(printed, small)
    # Two steps teach nothing: every line runs up to the one that says so.
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TaskNotLearnedError, match="single_double_quote"):
        exec(compile(example, "README.md", "exec"), {})
    assert "find_circuit" in example.splitlines()[-3]
