"""What the wheel holds: the package, all that it reads, and nothing else."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy without the folders that lie about in a checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    command = ["git", "archive", "--format=tar", "HEAD"]
    archive = subprocess.run(command, cwd=ROOT, capture_output=True)
    if archive.returncode:
        pytest.skip("not a git checkout")
    (folder / "source").mkdir()
    subprocess.run(["tar", "-x", "-C", folder / "source"], input=archive.stdout, check=True)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
             "--wheel-dir", str(folder), str(folder / "source")]  # fmt: skip
    run = subprocess.run(build, capture_output=True, text=True)
    if "No module named" in run.stderr or "Cannot import 'setuptools" in run.stderr:
        pytest.skip("setuptools is not installed")
    assert run.returncode == 0, run.stderr
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as opened:
        return set(opened.namelist())


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    tracked = subprocess.run(
        ["git", "ls-tree", "-r", "--name-only", "HEAD", "hf_circuit_sparsity"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    inside = {name for name in wheel if not name.split("/")[0].endswith(".dist-info")}
    assert inside == set(tracked)
    about = {name.split("/", 1)[1] for name in wheel - inside}
    assert {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE"} <= about
