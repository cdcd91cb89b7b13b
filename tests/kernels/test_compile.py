"""Where kernels cannot be compiled, everything runs without them."""

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers.testing_utils import CaptureLogger

import hf_circuit_sparsity
from hf_circuit_sparsity.kernels import compile as compiling
from hf_circuit_sparsity.kernels.cpu import load_kernels
from hf_circuit_sparsity.modeling.functional import abs_topk

# `ask()` starts a process that has imported all this, and loads no kernels before it answers.
ASKING = """
import os
import sys
import torch
from hf_circuit_sparsity.kernels.cpu import load_kernels
from hf_circuit_sparsity.modeling.functional import abs_topk

def ask() -> int:
    if child := os.fork():
        return child
    kept = abs_topk(torch.tensor([[1.0, -3.0, 2.0]]), 2).tolist()
    answer = f"{load_kernels() is not None} {kept}\\n"
    os.write(1, answer.encode())  # in one piece, as others may be writing
    os._exit(0)

def ended(child: int) -> None:
    assert os.waitpid(child, 0)[1] == 0, "it was ended by a signal"
"""
ANSWER = "True [[0.0, -3.0, 2.0]]"


def asked(code: str) -> list[str]:
    """What processes answer that a Python of its own starts by `ask()`."""
    run = subprocess.run(
        [sys.executable, "-c", ASKING + code], env=dict(os.environ), capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, (run.returncode, run.stderr)
    return run.stdout.splitlines()


needs_compiler = pytest.mark.skipif(load_kernels() is None, reason="no C compiler, or switched off")


@pytest.fixture
def quick_compiler(monkeypatch, tmp_path_factory) -> None:
    """The machine's, told to optimize nothing: how a library is kept is not how fast it is."""
    compiler = tmp_path_factory.mktemp("compiler") / "quick-cc"
    compiler.write_text('#!/bin/sh\nexec cc "$@" -O0\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))


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


@needs_compiler
def test_compiled_once_and_kept(are_loaded, tmp_path):
    folder = tmp_path / "hf_circuit_sparsity"
    assert are_loaded(XDG_CACHE_HOME=str(tmp_path))
    (library,) = folder.iterdir()
    made = library.stat().st_mtime_ns
    # A process of its own comes to the same name.
    assert asked("ended(ask())") == [ANSWER]
    assert [p.stat().st_mtime_ns for p in folder.iterdir()] == [made]


@needs_compiler
@pytest.mark.usefixtures("quick_compiler")
def test_a_library_that_was_cut_off_is_made_anew(are_loaded, tmp_path):
    assert are_loaded(XDG_CACHE_HOME=str(tmp_path))
    code = f"""
from pathlib import Path

for size in (0, -100):
    (library,) = Path({str(tmp_path / "hf_circuit_sparsity")!r}).iterdir()
    whole = library.read_bytes()
    library.write_bytes(whole[:size])
    ended(ask())
    (library,) = library.parent.iterdir()
    assert len(library.read_bytes()) == len(whole)
"""
    assert asked(code) == [ANSWER, ANSWER]


@needs_compiler
def test_a_library_without_our_functions_is_done_without(are_loaded, tmp_path):
    other = tmp_path / "other.c"
    other.write_text("int nothing(void) { return 0; }\n")
    compiler = tmp_path / "other-cc"
    compiler.write_text(
        f'#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\nexec cc -shared -fPIC -o "$2" {other}\n'
    )
    compiler.chmod(0o755)
    with CaptureLogger(compiling.logger) as said:
        assert not are_loaded(CC=str(compiler), XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert "could not be compiled" in said.out


def test_a_compiler_that_speaks_another_encoding(are_loaded, tmp_path):
    broken = tmp_path / "broken-cc"
    broken.write_bytes(b"#!/bin/sh\nprintf 'erreur \\351\\n' >&2\nexit 1\n")
    broken.chmod(0o755)
    with CaptureLogger(compiling.logger) as said:
        assert not are_loaded(CC=str(broken), XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert "erreur" in said.out


@needs_compiler
@pytest.mark.usefixtures("quick_compiler")
def test_a_folder_that_others_can_write_to_is_not_used(are_loaded, tmp_path):
    folder = tmp_path / "hf_circuit_sparsity"
    folder.mkdir()
    folder.chmod(0o777)
    with CaptureLogger(compiling.logger) as said:
        assert are_loaded(XDG_CACHE_HOME=str(tmp_path))
    assert "chmod go-w" in said.out and not list(folder.iterdir())


@needs_compiler
@pytest.mark.usefixtures("quick_compiler")
def test_without_a_home_or_with_one_that_is_no_folder(are_loaded, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    assert are_loaded(XDG_CACHE_HOME=str(tmp_path / "file"))  # cannot be made, as on a full disk
    monkeypatch.delenv("XDG_CACHE_HOME")

    def unknown():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(compiling.Path, "home", unknown)
    assert are_loaded()


@needs_compiler
@pytest.mark.usefixtures("quick_compiler")
def test_another_processor_has_a_library_of_its_own(are_loaded, tmp_path, monkeypatch):
    assert are_loaded(XDG_CACHE_HOME=str(tmp_path))
    monkeypatch.setattr(compiling, "_processor", lambda: "flags: fewer")
    assert are_loaded()
    assert len(list((tmp_path / "hf_circuit_sparsity").iterdir())) == 2


@needs_compiler
@pytest.mark.usefixtures("quick_compiler")
def test_several_processes_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert asked("for child in [ask(), ask()]: ended(child)") == [ANSWER, ANSWER]
    kept = list((tmp_path / "hf_circuit_sparsity").iterdir())
    assert kept and all(path.suffix == ".so" for path in kept)  # nothing half-made


@needs_compiler
def test_a_package_replaced_after_it_was_imported_keeps_its_kernels(
    tmp_path, monkeypatch, quick_compiler
):
    """Kernels of another version would take other arguments, and write where they must not."""
    package = Path(hf_circuit_sparsity.__file__).parent
    shutil.copytree(package, tmp_path / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.chdir(tmp_path)  # where `python -c` looks first
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = tmp_path / package.name / "kernels" / "source"
    replaced = f"""
import pathlib
for path in pathlib.Path({str(source)!r}).iterdir():
    path.write_text("#error another version")
ended(ask())
"""
    assert asked(replaced) == [ANSWER]
