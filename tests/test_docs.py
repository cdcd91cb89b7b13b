"""What the documents say is there is there: imported names, linked files, commands and modules."""

import ast
import importlib
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "benchmarks" / "README.md"]
# The changelog names what was removed.
DOCUMENTS = sorted(path for path in DOCUMENTS if path.name != "CHANGELOG.md")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_what_a_document_names_exists(path):
    text = path.read_text(encoding="utf-8")
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("hf_circuit_sparsity"):
                module = importlib.import_module(node.module)
                for alias in node.names:
                    assert alias.name == "*" or getattr(module, alias.name), alias.name
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (path.parent / link).exists(), link
    for name in re.findall(r"\bbenchmarks\.[a-z_.]*[a-z_]", text):
        assert importlib.util.find_spec(name), name
    for name in re.findall(r"`((?:hf_circuit_sparsity|tests|benchmarks|docs)/[\w/.]*)`", text):
        assert (ROOT / name).exists(), name
