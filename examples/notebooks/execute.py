"""Run notebooks anew and keep their outputs: python examples/notebooks/execute.py [NAME.ipynb ...]

Without names all of this folder run. They do so in this environment, which needs the extra [test],
and each in a temporary folder; what it writes there is thrown away.
"""

import os
import re
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent
PARAMETERS = "parameters"  # the tag of the cell whose values may be overridden, as for papermill


def execute(
    path: Path, parameters: Mapping[str, Any] | None = None, cwd: str | os.PathLike = "."
) -> nbformat.NotebookNode:
    """Run a notebook from its first cell to its last in a fresh kernel of this Python.

    Args:
        path: of the notebook; it is not changed.
        parameters: values to set after its cell tagged `parameters`, by name.
        cwd: folder it runs in.

    Returns:
        The notebook with new outputs, without times, versions and paths of this machine.

    Raises:
        ValueError: it has not exactly one cell of parameters, or none of a name that was passed.
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    notebook = nbformat.read(path, as_version=4)
    tagged = [i for i, c in enumerate(notebook.cells) if PARAMETERS in c.metadata.get("tags", [])]
    if len(tagged) != 1:
        raise ValueError(
            f"{path} has {len(tagged)} cells with the tag {PARAMETERS!r}, but it must have one."
        )
    known = re.findall(r"^(\w+) = ", notebook.cells[tagged[0]].source, flags=re.MULTILINE)
    values = dict(parameters or {})
    if unknown := values.keys() - set(known):
        raise ValueError(
            f"{path.name} has no parameters {sorted(unknown)}; pass some of {known} instead."
        )
    injected = nbformat.v4.new_code_cell("\n".join(f"{n} = {v!r}" for n, v in values.items()))
    notebook.cells.insert(tagged[0] + 1, injected)
    client = NotebookClient(
        notebook, timeout=None, kernel_name="python3", resources={"metadata": {"path": str(cwd)}}
    )
    client.execute(env={**os.environ, "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"})
    del notebook.cells[tagged[0] + 1]
    for number, cell in enumerate(c for c in notebook.cells if c.cell_type == "code"):
        cell.metadata.pop("execution", None)
        cell.execution_count = number + 1
        cell.outputs = _cleaned(cell.outputs)
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = number + 1
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return notebook


def _cleaned(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """Nothing of stderr (bars, advice), which differs from machine to machine; prints joined.

    How many pieces a cell's prints come in depends on how fast it ran.
    """
    kept: list[nbformat.NotebookNode] = []
    for output in outputs:
        is_print = output.output_type == "stream"
        if is_print and output.name == "stderr":
            continue
        if is_print and kept and kept[-1].output_type == "stream":
            kept[-1].text += output.text
        else:
            kept.append(output)
    return kept


def main(names: list[str]) -> None:
    """Run the notebooks with these file names, or all, and write them back in place."""
    for path in [FOLDER / name for name in names] or sorted(FOLDER.glob("*.ipynb")):
        with tempfile.TemporaryDirectory() as cwd:
            notebook = execute(path, cwd=cwd)
        text = nbformat.writes(notebook)
        if cwd in text or str(Path.home()) in text or str(FOLDER.parents[1]) in text:
            raise SystemExit(f"{path.name} shows a path of this machine; print less in it.")
        temporary = path.with_suffix(".tmp")
        temporary.write_text(text + "\n", encoding="utf-8")
        temporary.replace(path)
        print(path.name)


if __name__ == "__main__":
    main(sys.argv[1:])
