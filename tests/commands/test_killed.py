"""Commands that are killed again and again go on, and end as one that was not.

With `-s` they print how often they were killed when.
"""

import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.commands.test_bridge import dense  # noqa: F401  a fixture
from tests.commands.test_cli import train_arguments
from tests.commands.test_prune import GUESSING
from tests.commands.test_publish import publishing, run_dir  # noqa: F401  a fixture

KILLS = 20
CLI = [sys.executable, "-m", "hf_circuit_sparsity.cli"]
# What an artifact is made of. All else says when, where and how fast, and is there or not.
CONTENT = {".safetensors", ".py", ".png"}
CONTENT_NAMES = {"circuit.json", "quickstart.json", "config.json", "tokenizer.json"}


def unfinished(folder: Path) -> bool:
    """Whether something in a folder has its temporary name, as it has while it is written."""
    try:
        return any(".tmp" in path.name for path in folder.rglob(".*"))
    except OSError:  # moved to its place while we looked
        return False


def content(folder: Path) -> dict[str, bytes]:
    """What a folder holds: every name, and the bytes of what is not of its time."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        if path.suffix in CONTENT or path.name in CONTENT_NAMES
        else b""
        for path in folder.rglob("*")
        if path.is_file()
    }


def killed_until_done(
    command: list[str],
    cwd: Path,
    saving: Callable[[], bool],
    lived: Callable[[], None],
    *,
    within: float,
    kills: int = KILLS,
) -> None:
    """Run a command again and again, killed at random moments, half of the time in a save.

    Args:
        cwd: the folder in which it runs.
        saving: whether the command is saving something just now.
        lived: called when it came to its end in spite of that, before it begins anew.
        within: seconds from its start, at most, in which it is killed or a save waited for.
        kills: how often to kill it before it is let go on to its end.
    """
    draw, killed = random.Random(1), Counter()
    while True:
        aimed, wait = draw.random() < 0.5, draw.uniform(0, within)
        process = subprocess.Popen(
            command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        began = time.monotonic()
        while process.poll() is None and killed.total() < kills:
            if time.monotonic() - began > wait and (saving() or not aimed):
                killed["in a save" if saving() else "elsewhere"] += 1
                process.kill()
                break
            time.sleep(0.0005)
        output = process.communicate()[0].decode()
        assert process.returncode in (0, -9), output
        if process.returncode == 0:
            lived()
            if killed.total() == kills:
                print(dict(killed))
                assert killed["in a save"] >= kills // 4
                return


def ends_as_one_that_is_not(
    command: list[str], tmp_path: Path, within: float | None = None
) -> None:
    """Hold what a killed command leaves in the folder `run`, below where it runs, against what it
    leaves undisturbed."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    began = time.monotonic()
    subprocess.run(command, cwd=whole, check=True, capture_output=True)
    took, expected = time.monotonic() - began, content(whole / "run")
    folder = killed / "run"

    def lived() -> None:
        found = content(folder)
        assert found.keys() == expected.keys()
        assert [name for name in expected if found[name] != expected[name]] == []
        shutil.rmtree(folder)

    killed_until_done(command, killed, lambda: unfinished(folder), lived, within=within or took)


@pytest.mark.slow
@pytest.mark.parametrize("sparsifier", ["topk", "rcd"])
def test_training(sparsifier, corpus, tmp_path):
    more = ["--max-steps", "600", "--save-steps", "10", "--sparsifier", sparsifier,
            "--resume-from-checkpoint", "auto"]  # fmt: skip
    ends_as_one_that_is_not([*CLI, *train_arguments(corpus, "run", *more)], tmp_path)


@pytest.mark.slow
def test_a_bridge(dense, corpus, tmp_path):  # noqa: F811
    command = [
        *CLI, "bridge", "--dense-model", str(dense), "--output-dir", "run", "--corpus",
        str(corpus), "--block-size", "64", "--per-device-train-batch-size", "4",
        "--report-to", "none", "--use-cpu", "--max-steps", "200", "--save-steps", "10",
        "--resume-from-checkpoint", "auto",
    ]  # fmt: skip
    ends_as_one_that_is_not(command, tmp_path)


@pytest.mark.slow
def test_a_quickstart(corpus, tmp_path, monkeypatch):
    code = f"""
import sys
import pytest
from hf_circuit_sparsity.cli import main
from hf_circuit_sparsity.commands import quickstart
from tests.commands.test_cli import tiny_quickstart
tiny_quickstart(pytest.MonkeyPatch())
quickstart.STEPS = 400
sys.exit(main(["quickstart", "--output-dir", "run", "--corpus", {str(corpus)!r}]))
"""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    ends_as_one_that_is_not([sys.executable, "-c", code], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("trials", [[], ["--trials", "3"]], ids=["one", "trials"])
def test_pruning(trials, saved, corpus, tmp_path):
    command = [
        *CLI, "prune", "--model", str(saved), *GUESSING, *trials, "--output-dir", "run",
        "--corpus", str(corpus),
    ]  # fmt: skip
    ends_as_one_that_is_not(command, tmp_path)


@pytest.mark.slow
def test_publishing(hub_server, run_dir, corpus, monkeypatch, tmp_path):  # noqa: F811
    """It is killed while a part is on its way, or wherever it is; the Hub then has all parts once,
    as if nothing had been, and nothing is left in the folder for temporary files."""
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    command, sent = publishing(run_dir, corpus), [0.0]

    def published() -> dict[str, bytes]:
        hub = hub_server.hub
        heads = [repo.refs["main"].encode() for repo in hub.repositories.values()]
        files = {}
        for name, repo in hub.repositories.items():
            for path, file in repo.commits[repo.refs["main"]].files.items():
                files[f"{name}/{path}"] = file.content
                for head in heads:  # the circuits' card names the model's, which has its time
                    files[f"{name}/{path}"] = files[f"{name}/{path}"].replace(head, b"HEAD")
        return files

    def note(request) -> None:
        if request.method in ("PUT", "POST"):
            sent[0] = time.monotonic()

    def begin_anew() -> None:
        hub = hub_server.hub
        for of in (hub.repositories, hub.objects, hub.collections):
            of.clear()
        hub_server.log.clear()

    began = time.monotonic()
    subprocess.run(command, check=True, capture_output=True, env=os.environ)
    took, expected = time.monotonic() - began, published()
    assert len(expected) > 10
    begin_anew()
    hub_server.before = note

    def lived() -> None:
        assert published() == expected
        objects = [e.path for e in hub_server.log if e.method == "PUT" and e.status == 200]
        assert len(objects) == len(set(objects)), "an object was sent twice"
        assert not list((tmp_path / "tmp").iterdir())
        begin_anew()

    killed_until_done(
        command, tmp_path, lambda: time.monotonic() - sent[0] < 0.01, lived, within=took
    )
