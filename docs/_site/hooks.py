"""What the site shows besides docs/: the README first, the notebooks, and what was measured."""

import re
import sys
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
AS_IT_IS = ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "LICENSE")
HOME = "index.md"

sys.path.insert(0, str(Path(__file__).parent))  # mkdocs loads this file by its path
from notebooks import pages_of_notebook  # noqa: E402


def on_files(files, config):
    """Add pages that lie outside of docs/, under the paths they have in the repository."""
    add = {HOME: ROOT / "README.md"}
    add |= {name: ROOT / name for name in AS_IT_IS}
    shown = {".md", ".png", ".svg", ".json", ".yaml"}
    for folder in ("benchmarks", "examples"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in shown:
                add[path.relative_to(ROOT).as_posix()] = path
    for name, path in add.items():
        files.append(File.generated(config, name, abs_src_path=str(path)))
    for path in sorted((ROOT / "examples" / "notebooks").glob("*.ipynb")):
        for name, content in pages_of_notebook(path).items():
            files.append(File.generated(config, f"examples/notebooks/{name}", content=content))
    return files


def on_page_markdown(markdown, page, config, files):
    """The site has docs/ at its root, so the links between docs/ and the rest are one step less."""
    markdown = re.sub(r"(\]\([^)\s]*)\.ipynb\)", r"\1.md)", markdown)
    depth = page.file.src_uri.count("/")
    if page.file.src_uri == HOME or depth == 0:
        markdown = re.sub(r"\]\((?:\.\./|docs/)(?!\.\.)", "](", markdown)
    else:
        up = "../" * depth
        markdown = markdown.replace(f"]({up}docs/", f"]({up}")
    return markdown
