"""The house: imports only go down, along the table in CONTRIBUTING.md, and never in circles.

Every import counts, also those for type checkers only and those inside functions.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = "hf_circuit_sparsity"


@cache
def modules() -> dict[str, Path]:
    """Every module of the package: dotted name to file."""
    files = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


def imported_modules(name: str) -> Iterator[str]:
    """The modules of the package that module `name` imports."""
    path = modules()[name]
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules())
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *(node.module.split(".") if node.module else [])])
            for alias in node.names:
                target = f"{source}.{alias.name}"
                if target in modules():
                    yield target
                elif source in modules():
                    yield source


def short(name: str) -> str:
    """The file of a module, relative to the package."""
    return modules()[name].relative_to(ROOT / PACKAGE).as_posix()


@cache
def imports() -> frozenset[tuple[str, str]]:
    """Every import inside the package, as (file that imports, file that is imported)."""
    return frozenset(
        (short(name), short(target)) for name in modules() for target in imported_modules(name)
    )


def room(file: str) -> str:
    """The room of a file: its top folder, or the file itself where it lies beside the rooms."""
    return file.split("/")[0]


def allowed_arrows() -> dict[str, set[str]]:
    """The table in CONTRIBUTING.md: each room to the rooms it may import."""
    allowed: dict[str, set[str]] = {}
    text = (ROOT / "CONTRIBUTING.md").read_text()
    table = re.search(r"^\| floor \|.*?\n\n", text, re.DOTALL | re.MULTILINE).group().strip()
    for row in table.splitlines()[2:]:
        _, _, rooms, _, may_import, _ = (cell.strip() for cell in row.split("|"))
        statically = may_import.split(";")[0]
        targets = {name.rstrip("/") for name in re.findall(r"`([^`]+)`", statically)}
        for name in re.findall(r"`([^`]+)`", rooms):
            allowed[name.rstrip("/")] = targets
    return allowed


def test_every_room_is_in_the_table() -> None:
    rooms = {room(short(name)) for name in modules()}
    assert rooms == set(allowed_arrows())


def test_imports_follow_the_table() -> None:
    allowed = allowed_arrows()
    wrong = {
        (file, target)
        for file, target in imports()
        if room(file) != room(target) and room(target) not in allowed.get(room(file), set())
    }
    assert wrong == set()


def test_files_import_each_other_in_no_circle() -> None:
    assert tied(imports()) == set()


def tied(arrows: frozenset[tuple[str, str]]) -> set[tuple[str, str]]:
    """Those of `arrows` that are part of a circle."""
    graph: dict[str, set[str]] = {}
    for file, target in arrows:
        graph.setdefault(file, set()).add(target)

    def reaches(start: str) -> set[str]:
        seen: set[str] = set()
        todo = [start]
        while todo:
            fresh = graph.get(todo.pop(), set()) - seen
            seen |= fresh
            todo += fresh
        return seen

    reachable = {file: reaches(file) for file in graph}
    return {
        (file, target)
        for file, target in arrows
        if file == target or file in reachable.get(target, set())
    }


def test_names_are_imported_from_the_module_that_defines_them() -> None:
    wrong = {(file, target) for file, target in imports() if only_reexports(target)}
    assert wrong == set()


def only_reexports(file: str) -> bool:
    """Whether a file is the `__init__` of a package and defines neither function nor class."""
    path = ROOT / PACKAGE / file
    return path.name == "__init__.py" and not any(
        isinstance(node, ast.FunctionDef | ast.ClassDef)
        and node.name not in ("__getattr__", "__dir__")
        for node in ast.parse(path.read_text()).body
    )


def test_modeling_needs_only_what_is_installed_with_transformers() -> None:
    may_import = {"torch", "numpy", "transformers", "safetensors", "huggingface_hub", PACKAGE}
    for name, path in modules().items():
        if room(short(name)) != "modeling":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                outside = {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                outside = {node.module.split(".")[0]}
            else:
                continue
            assert outside <= may_import | sys.stdlib_module_names, path
