"""The site builds without a broken link, and its reference has what the docstrings say."""

import base64
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import hf_circuit_sparsity

ROOT = Path(__file__).parents[1]
RESULTS = sorted(path.stem for path in ROOT.glob("benchmarks/results/*.md"))


def of_the_site(name: str):
    """A module of docs/_site, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / "_site" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def listed(nav) -> list[str]:
    """The pages of a navigation, at any depth."""
    if isinstance(nav, str):
        return [nav]
    return [
        page for part in (nav if isinstance(nav, list) else nav.values()) for page in listed(part)
    ]


def test_the_navigation_has_every_page_once():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = listed(yaml.safe_load(text[text.index("\nnav:") :])["nav"])
    there = {f"docs/{path.name}" for path in ROOT.glob("docs/*.md")}
    there |= {f"benchmarks/results/{name}.md" for name in RESULTS} | {"benchmarks/README.md"}
    there |= {
        path.relative_to(ROOT).with_suffix(".md").as_posix()
        for path in ROOT.glob("examples/notebooks/*.ipynb")
    }
    elsewhere = {"index.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"}
    assert len(pages) == len(set(pages))
    assert set(pages) - elsewhere == {page.removeprefix("docs/") for page in there}


def test_findings_say_a_sentence_of_every_result():
    text = (ROOT / "docs" / "findings.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[(\w+)\]\(\.\./benchmarks/results/(\w+)\.md\) \| .+\. \|$", text, re.M)
    assert all(name == link for name, link in rows)
    assert sorted(name for name, _ in rows) == RESULTS


def test_pictures_of_concepts_are_what_the_script_draws():
    script = of_the_site("draw_concepts")
    assert {path.name for path in script.FOLDER.iterdir()} == script.PICTURES.keys()
    for name, draw in script.PICTURES.items():
        assert (script.FOLDER / name).read_text(encoding="utf-8") == draw(), name


def test_a_notebook_becomes_a_page_with_what_it_printed_and_drew(tmp_path):
    picture = base64.b64encode(b"\x89PNG").decode()
    outputs = [
        {"output_type": "stream", "name": "stdout", "text": ["a ``` b\n"]},
        {"output_type": "display_data", "data": {"image/png": picture, "text/plain": "<Image>"}},
        {"output_type": "display_data", "data": {"text/markdown": "| x |", "text/plain": "y"}},
    ]
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "words"]},
        {"cell_type": "code", "source": "# A picture\ndraw()", "outputs": outputs},
    ]
    path = tmp_path / "some.ipynb"
    path.write_text(json.dumps({"cells": cells}), encoding="utf-8")
    pages = of_the_site("notebooks").pages_of_notebook(path)
    assert list(pages) == ["some.md", "some_0.png"] and pages["some_0.png"] == b"\x89PNG"
    page = pages["some.md"]
    assert page.startswith("# Title\nwords\n") and "````text\na ``` b\n````" in page
    assert "```python\n# A picture\ndraw()\n```" in page and "\n| x |\n" in page
    assert "![A picture](some_0.png)" in page and "<Image>" not in page


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
    notebook = (tmp_path / "examples" / "notebooks" / "circuit" / "index.html").read_text("utf-8")
    assert "find_circuit" in notebook and re.search(
        r'<img [^>]*src="[^"]*circuit_\d\.png"', notebook
    )
