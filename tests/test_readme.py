"""The README's examples: the first as printed, the second in small and (slow) as printed."""

import re
import shutil
import sysconfig
import webbrowser
from pathlib import Path
from urllib.parse import unquote

import pytest

from hf_circuit_sparsity import Circuit

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"


@pytest.fixture
def blocks(tmp_path, monkeypatch) -> list[str]:
    """The blocks of Python, to be run in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


@pytest.fixture
def example(blocks) -> str:
    """The block that trains."""
    return blocks[1]


def test_the_badges_tell_the_truth():
    """Each says in words and in its picture what is written elsewhere."""
    written = (ROOT / "pyproject.toml").read_text()
    (version,) = re.findall(r'^version = "(.*)"', written, re.M)
    pythons = re.findall(r"Python :: (3\.\d+)", written)
    (transformers,) = re.findall(r'"transformers>=(.*)"', written)
    (licence,) = re.findall(r'^license = "(.*)"', written, re.M)
    expected = {
        "version": version,
        "Python": f"{pythons[0]} to {pythons[-1]}",
        "transformers": f"≥ {transformers}",
        "licence": licence,
    }
    badges = re.findall(
        r"\[!\[(.*?)\]\(https://\S+/badge/(\S+)-\w+\)\]\((.*?)\)", README.read_text()
    )
    shown = {}
    for words, picture, target in badges:
        # A dash within is written as two, a space as an underscore.
        name, value = unquote(picture).replace("--", "\0").replace("_", " ").split("-")
        shown[name] = value.replace("\0", "-")
        assert words.removesuffix(" or newer") == f"{name} {shown[name].removeprefix('≥ ')}"
        assert (ROOT / target).is_file()
    assert shown == expected


def test_the_version_is_dated_and_the_same_everywhere():
    (version,) = re.findall(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.M)
    released = re.findall(
        r"^## (\S+) - (\d{4}-\d\d-\d\d)$", (ROOT / "CHANGELOG.md").read_text(), re.M
    )
    assert released[0][0] == version
    cited = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {version}\n" in cited and f"\ndate-released: {released[0][1]}\n" in cited


def test_the_first_lines_load_print_and_open_a_circuit(blocks, monkeypatch, capsys):
    opened = []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert len(blocks[0].strip().splitlines()) <= 7  # six, and an empty one
    exec(compile(blocks[0], "README.md", "exec"), {})
    assert "single_double_quote" in capsys.readouterr().out
    (page,) = opened
    assert page == Path("circuit.html").absolute().as_uri()
    assert "<html" in Path("circuit.html").read_text(encoding="utf-8")


def run(example: str) -> Circuit:
    names: dict[str, Circuit] = {}
    exec(compile(example, "README.md", "exec"), names)
    assert Path("circuit.png").read_bytes().startswith(b"\x89PNG")
    assert Circuit.from_pretrained("runs/mine/circuit").nodes == names["circuit"].nodes
    return names["circuit"]


def test_every_line_runs(example, tmp_path):
    library = tmp_path / "library"
    library.mkdir()
    for name in ("argparse", "dataclasses", "inspect", "typing"):
        shutil.copy(Path(sysconfig.get_path("stdlib")) / f"{name}.py", library)
    for printed, small in {
        "build_corpus()": f"build_corpus({str(library)!r})",
        "max_steps=2500": "max_steps=2",
        # Two steps teach nothing, and a circuit of guessing is a circuit all the same.
        "target_loss=0.3, max_steps=150": "target_loss=9.0, cleanup=False, max_steps=2",
        "selection_prompts=512": "selection_prompts=16",
    }.items():
        assert example.count(printed) == 1
        example = example.replace(printed, small)
    run(example)


@pytest.mark.slow
def test_as_printed_it_finds_its_circuit(example):
    metrics = run(example).metrics
    print(metrics)
    # Another library or processor trains another model: the quickstart's of five seeds had
    # calibrated losses from 0.02 to 0.15, and circuits from 0.07 to 0.19.
    assert metrics["circuit_loss"] < 0.3 and metrics["circuit_accuracy"] > 0.85
    assert metrics["nodes"] < 60
