"""Names of repositories."""

import os
import re

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"


def is_hub_id(name: str | os.PathLike) -> bool:
    """Whether a name has the form `user/name` and is no folder here."""
    name = os.fspath(name)
    return re.fullmatch(f"{_NAME}/{_NAME}", name) is not None and not os.path.exists(name)


def check_hub_id(name: str) -> None:
    """Raise a `ValueError` unless a name has the form `user/name`."""
    if re.fullmatch(f"{_NAME}/{_NAME}", name) is None:
        raise ValueError(f"{name!r} was passed, but a repository is named like user/name.")


def web_address(endpoint: str, repo_id: str, kind: str) -> str:
    """Where a person finds a repository of kind "model", "dataset" or "space"."""
    return f"{endpoint}/{repo_id}" if kind == "model" else f"{endpoint}/{kind}s/{repo_id}"
