"""A small corpus for every command."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A folder of Python in which quotes close as they were opened, and little else happens."""
    folder = tmp_path_factory.mktemp("corpus")
    names = ["alpha", "beta", "gamma", "delta", "omega", "sigma"]
    for number in range(12):
        lines = []
        for i in range(120):
            quote = "\"'"[(i * 7 + number) % 2]
            a, b = names[(i + number) % 6], names[(i * 5 + 1) % 6]
            lines.append(f"{a} = {quote}{b} {a}{quote} + {b}")
            lines.append(f"if {a} == {i}:\n    return True\nwhile True:\n    {b}({a}, [{i}, 2])")
        (folder / f"module_{number}.py").write_text("\n".join(lines) + "\n")
    return folder
