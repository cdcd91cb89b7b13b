"""Nothing here is imported, and no sdist fetched, where none of it would run."""

from pathlib import Path

import pytest


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """All of it is slow; imported, it would only be deselected."""
    return True if config.option.markexpr == "not slow" else None
