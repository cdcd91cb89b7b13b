"""The site builds without a broken link, and its reference has what the docstrings say."""

import importlib.util
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
