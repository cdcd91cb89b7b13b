"""Test suites of other packages, out of the sdist of the installed version.

pip fetches the sdist once into `.suites/`, which git ignores; nothing of it is copied here.
"""

import importlib
import importlib.metadata
import subprocess
import sys
import tarfile
import types
from pathlib import Path

import pytest

FOREIGN_MARKERS = (
    "accelerate_tests", "flash_attn_test", "flash_attn_3_test", "flash_attn_4_test",
    "torch_compile_test",
)  # fmt: skip
SUITES = Path(__file__).parents[2] / ".suites"


def load(package: str, module: str, lacking: dict[str, dict[str, object]]) -> types.ModuleType:
    """A module out of the folder `tests` of a package's sdist.

    Args:
        package: its name on PyPI.
        module: of that folder.
        lacking: what the module imports and is not there: the names of modules, those in the
            folder beginning with a dot, to what stands in for their contents.
    """
    release = f"{package}-{importlib.metadata.version(package)}"
    if not (SUITES / release).is_dir():
        pinned = release.replace("-", "==")
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary=:all:"]
        command = [*pip, "--no-build-isolation", f"--dest={SUITES}", pinned]
        if subprocess.run(command, check=False).returncode:
            # Skipping would look as if the suite had passed.
            raise RuntimeError(f"pip could not fetch the sdist of {pinned}")
        with tarfile.open(SUITES / f"{release}.tar.gz") as archive:
            archive.extractall(SUITES, filter="data")
    (SUITES / release / "tests" / "__init__.py").touch()
    for marker in FOREIGN_MARKERS:  # pytest is strict about them
        pytest.mark._config.addinivalue_line("markers", marker)
    name = f"suite_of_{package}"
    folder = types.ModuleType(name)
    folder.__path__ = [str(SUITES / release / "tests")]
    sys.modules[name] = folder
    for inner, contents in lacking.items():
        full = name + inner if inner.startswith(".") else inner
        parents = full.split(".")
        for depth in range(1, len(parents) + 1):
            part = ".".join(parents[:depth])
            if part not in sys.modules:
                sys.modules[part] = types.ModuleType(part)
                sys.modules[part].__path__ = []
        vars(sys.modules[full]).update(contents)
    return importlib.import_module(f"{name}.{module}")


def expect_failures(tests: type, reasons: dict[str, str]) -> type:
    """Mark the tests of a class that fail for a reason of the suite's own; they must fail."""
    for name, reason in reasons.items():
        test = getattr(tests, name)
        setattr(tests, name, pytest.mark.xfail(reason=reason, strict=True)(test))
    return tests
