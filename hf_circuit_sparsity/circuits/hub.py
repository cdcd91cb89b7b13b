"""Circuits on the Hub: where in a repository they lie, and how to get them from there.

A repository may hold one circuit at its root and any number in folders; each is a `circuit.json`
beside a `circuit.safetensors`.
"""

import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from ..hub.errors import HubAccessError, hub_errors
from ..hub.repository import is_hub_id
from .circuit_file import JSON_NAME, TENSORS_NAME

if TYPE_CHECKING:
    from .circuit import Circuit

PICTURE_NAME = "circuit.png"
TAG = "circuit"


def model_source(model: Any) -> tuple[str, str]:
    """A model's path or Hub id, and its commit hash if it came from the Hub; "" where unknown."""
    config = getattr(model, "config", None)
    name = getattr(config, "_name_or_path", "") or ""
    return name, (getattr(config, "_commit_hash", "") or "") if is_hub_id(name) else ""


def model_text(fingerprint: str, name: str, revision: str) -> str:
    """A model for an error message: its fingerprint and, where known, name and commit."""
    at = f" at {revision[:12]}" if revision else ""
    return f"{fingerprint} ({name}{at})" if name else fingerprint


@dataclass(frozen=True)
class CircuitOnHub:
    """Where a circuit lies on the Hub.

    Attributes:
        repo_id: `user/name`.
        subfolder: its folder in there; "" at the root.
        revision: commit hash.
    """

    repo_id: str
    subfolder: str
    revision: str

    def load(self, **options: Any) -> "Circuit":
        """The circuit, at this very commit; options as of [`Circuit.from_pretrained`]."""
        from .circuit import Circuit

        return Circuit.from_pretrained(
            self.repo_id, subfolder=self.subfolder, revision=self.revision, **options
        )


def list_circuits(
    repo_id: str, *, revision: str | None = None, token: str | bool | None = None
) -> list[CircuitOnHub]:
    """The circuits in a repository, then those of other repositories that name it as base model.

    Args:
        repo_id: `user/name` of a model, or of a repository of circuits.
        revision: branch, tag or commit hash of that repository; the others are read at their head.
        token: access token; the saved one if not given, none if False.

    Raises:
        HubAccessError: (an `OSError`) the repository is missing or cannot be read.
    """
    api = HfApi(token=token)
    with hub_errors(repo_id, revision=revision, token=token):
        info = api.model_info(repo_id, revision=revision)
        found = _circuits_in(info)
        # The Hub makes such a tag of every card that names a base model.
        tags = [f"base_model:{repo_id}", TAG]
        for other in api.list_models(filter=tags, full=True):
            if other.id != repo_id:
                found += _circuits_in(other)
    return found


def _circuits_in(info: Any) -> list[CircuitOnHub]:
    files = {sibling.rfilename for sibling in info.siblings or ()}
    folders = sorted(
        str(path.parent) for path in map(PurePosixPath, files) if path.name == JSON_NAME
    )
    return [
        CircuitOnHub(info.id, "" if folder == "." else folder, info.sha)
        for folder in folders
        if str(PurePosixPath(folder) / TENSORS_NAME) in files
    ]


def download_circuit(
    repo_id: str,
    *,
    subfolder: str = "",
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
) -> Path:
    """A folder of the cache with the two files of a circuit, both of the same commit.

    Raises:
        HubAccessError: the repository, the revision or the circuit in it is missing.
    """
    where: dict[str, Any] = {"subfolder": subfolder or None, "token": token}
    where |= {"cache_dir": cache_dir, "local_files_only": local_files_only}
    with hub_errors(repo_id, revision=revision, token=token):
        try:
            path = Path(hf_hub_download(repo_id, JSON_NAME, revision=revision, **where))
            commit = path.parents[len(PurePosixPath(subfolder).parts)].name
            hf_hub_download(repo_id, TENSORS_NAME, revision=commit, **where)
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError as error:
            raise HubAccessError(_no_circuit(repo_id, subfolder, revision, token)) from error
    return path.parent


def _no_circuit(
    repo_id: str, subfolder: str, revision: str | None, token: str | bool | None
) -> str:
    info = HfApi(token=token).model_info(repo_id, revision=revision)
    at = f" in {subfolder!r}" if subfolder else " at its root"
    folders = [repr(circuit.subfolder) for circuit in _circuits_in(info)]
    if folders:
        return f"{repo_id!r} holds no circuit{at}; pass subfolder= one of {', '.join(folders)}."
    return (
        f"{repo_id!r} holds no circuit (no {JSON_NAME} beside a {TENSORS_NAME}); pass the name of "
        "a repository of circuits."
    )
