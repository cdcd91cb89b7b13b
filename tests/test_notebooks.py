"""The notebooks hold what they printed and drew, and run in small from first cell to last."""

import importlib.util
import re
import shutil
import sysconfig
from pathlib import Path

import nbformat
import pytest

FOLDER = Path(__file__).parents[1] / "examples" / "notebooks"
SPEC = importlib.util.spec_from_file_location("execute_notebooks", FOLDER / "execute.py")
execute_notebooks = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(execute_notebooks)

# The values of a run in small; a circuit can only be verified where the model has learned its task.
SMALL = {
    "train": {"VOCAB_SIZE": 300, "D_MODEL": 32, "STEPS": 4},
    "circuit": {"LINES": 6000, "STEPS": 300, "MASK_STEPS": 60, "TARGET_LOSS": 0.4, "PROMPTS": 32},
    "steer": {
        "LINES": 2000, "DENSE_STEPS": 3, "SPARSE_STEPS": 3, "BRIDGE_STEPS": 2, "PROMPTS": 8,
    },
    "pretrained": {"DENSE_STEPS": 3, "SPARSE_STEPS": 10},
}  # fmt: skip
FAST = "train"
PATHS = sorted(FOLDER.glob("*.ipynb"))


def shown(notebook: nbformat.NotebookNode) -> list[str]:
    """The kinds of all outputs: `stream`, `error`, or types of what is displayed."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [kind for o in outputs for kind in sorted(o.get("data", [o["output_type"]]))]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_it_is_kept_as_it_ran(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert "image/png" in shown(notebook) and "error" not in shown(notebook)
    # Neither a home nor a folder of packages, of whatever machine it ran on.
    assert not re.search(
        r"/(home|root|Users|tmp)/|site-packages|\\\\Users", path.read_text("utf-8")
    )
    for link in re.findall(r"\]\(([^)#:]+)[^)]*\)", path.read_text(encoding="utf-8")):
        assert (FOLDER / link).exists(), link


def test_each_has_values_for_a_run_in_small():
    assert {path.stem for path in PATHS} == SMALL.keys()


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n == FAST else pytest.mark.slow) for n in SMALL]
)
def test_it_runs_in_small(name, tmp_path):
    library = tmp_path / "library"
    library.mkdir()
    for module in ("argparse", "dataclasses", "inspect", "textwrap", "typing"):
        shutil.copy(Path(sysconfig.get_path("stdlib")) / f"{module}.py", library)
    values = SMALL[name] | ({"CORPUS": "library"} if name in ("train", "pretrained") else {})
    path = FOLDER / f"{name}.ipynb"
    kept = nbformat.read(path, as_version=4)
    notebook = execute_notebooks.execute(path, values, cwd=tmp_path)
    # It shows the same kinds of things as the one that is kept, whose cells it has.
    assert shown(notebook) == shown(kept)
    assert [cell.source for cell in notebook.cells] == [cell.source for cell in kept.cells]


def test_parameters_that_it_does_not_have_are_refused(tmp_path):
    with pytest.raises(ValueError, match="STPES"):
        execute_notebooks.execute(PATHS[0], {"STPES": 3}, cwd=tmp_path)
    bare = tmp_path / "bare.ipynb"
    nbformat.write(nbformat.v4.new_notebook(), bare)
    with pytest.raises(ValueError, match="parameters"):
        execute_notebooks.execute(bare, cwd=tmp_path)
