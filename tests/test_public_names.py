"""What `import hf_circuit_sparsity` offers, what it imports, and what it registers."""

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from textwrap import indent

import pytest

import hf_circuit_sparsity
from tests.conftest import FIXTURES

SAVED = FIXTURES / "saved_at_b9f8998"
HEAVY = {"datasets", "transformers.trainer", "peft", "pandas", "pyarrow", "matplotlib", "optuna"}
TRANSFORMERS = f"""
from transformers import AutoConfig, AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(SAVED / "model_dense")!r})
assert type(model).__module__.startswith("hf_circuit_sparsity."), type(model)
assert "circuitgpt_bridge" in AutoConfig.for_model("circuitgpt_bridge").model_type
"""
PEFT = f"""
from peft import PeftConfig
for name in ("circuit_adapter", "bridge"):
    config = PeftConfig.from_pretrained({str(SAVED)!r} + "/" + name)
    assert type(config).__module__.startswith("hf_circuit_sparsity."), type(config)
"""


def run(code: str) -> str:
    """What a Python of its own prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_public_name_is_there_and_listed():
    for name in hf_circuit_sparsity.__all__:
        assert getattr(hf_circuit_sparsity, name).__name__ == name
    assert set(hf_circuit_sparsity.__all__) <= set(dir(hf_circuit_sparsity))
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = hf_circuit_sparsity.no_such_name


def test_the_reference_has_every_public_name_once():
    page = Path(hf_circuit_sparsity.__file__).parents[1] / "docs" / "reference.md"
    listed = re.findall(r"^::: hf_circuit_sparsity\.(\w+)$", page.read_text(), flags=re.MULTILINE)
    assert sorted(listed) == hf_circuit_sparsity.__all__


def test_editors_see_the_names_where_they_are_imported_from():
    tree = ast.parse(Path(hf_circuit_sparsity.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert seen == hf_circuit_sparsity._MODULES


def test_names_are_imported_when_they_are_used():
    show = "import sys; print(*sys.modules)"
    loaded = run(f"import hf_circuit_sparsity; {show}").split()
    assert not {"torch", "transformers", "numpy"} & set(loaded)
    loaded = run(f"from hf_circuit_sparsity import CircuitGPTForCausalLM; {show}").split()
    assert not HEAVY & set(loaded)


@pytest.mark.parametrize("order", ["first", "last"])
def test_types_are_registered_whatever_is_imported_first(order):
    """In two processes, one for each library, which share the imports before they part."""
    ours = "import hf_circuit_sparsity\n"
    common = f"{ours}import torch" if order == "first" else "import transformers.modeling_utils"
    codes = []
    for library in (TRANSFORMERS, PEFT):
        imports, rest = library.strip().split("\n", 1)
        code = f"{imports}\n{rest}" if order == "first" else f"{imports}\n{ours}{rest}"
        codes.append(indent(code, "    "))
    child, parent = codes
    parent += "\n    assert os.waitpid(child, 0)[1] == 0"
    fork = f"import os\nchild = os.fork()\nif not child:\n{child}\nelse:\n{parent}"
    run(f"{common}\n{fork}")


@pytest.mark.slow
def test_the_wheel_holds_the_package_its_data_and_its_licences(tmp_path):
    root = Path(hf_circuit_sparsity.__file__).parents[1]
    source = tmp_path / "source"
    shutil.copytree(root / "hf_circuit_sparsity", source / "hf_circuit_sparsity")
    for name in ("pyproject.toml", "README.md", "LICENSE", "tests", "benchmarks"):
        copy = shutil.copytree if (root / name).is_dir() else shutil.copy
        copy(root / name, source / name)
    wheel = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    subprocess.run([*wheel, "-w", tmp_path, source], check=True, capture_output=True)
    (path,) = tmp_path.glob("*.whl")
    files = zipfile.ZipFile(path).namelist()
    assert {name.split("/")[0].split("-")[0] for name in files} == {"hf_circuit_sparsity"}
    # Whatever lies in the package beside its modules is data that it needs.
    for data in (root / "hf_circuit_sparsity").rglob("*"):
        if data.is_file() and data.suffix != ".pyc":
            assert data.relative_to(root).as_posix() in files
    assert sum(name.endswith("/LICENSE") for name in files if "dist-info" in name) == 2
