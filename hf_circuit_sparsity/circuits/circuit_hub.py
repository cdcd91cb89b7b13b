"""Circuits on the Hub: where in a repository they lie, how they get there and back.

A repository may hold one circuit at its root and any number in folders; each is a `circuit.json`
beside a `circuit.safetensors`.
"""

import os
import tempfile
import warnings
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from ..hub import HubAccessError, hub_errors, is_hub_id
from ..modeling.card_slot import card_of
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


def push_circuit(
    circuit: "Circuit",
    repo_id: str,
    *,
    subfolder: str = "",
    base_model: str | None = None,
    base_model_revision: str | None = None,
    model: Any = None,
    tokenizer: Any = None,
    private: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
) -> CommitInfo:
    """Upload a circuit in one commit; see [`Circuit.push_to_hub`]."""
    if model is not None:
        circuit.check_model(model)
    api = HfApi(token=token)
    circuit = with_base_model(circuit, base_model, base_model_revision, api)
    with hub_errors(repo_id, revision=revision, token=token, writing=True):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        _refuse_to_replace(circuit, repo_id, subfolder, revision, token)
        with tempfile.TemporaryDirectory() as folder:
            circuit.save_pretrained(folder)
            if model is not None:
                circuit.plot(Path(folder) / PICTURE_NAME, model, tokenizer)
            operations = [
                CommitOperationAdd(str(PurePosixPath(subfolder) / path.name), path)
                for path in sorted(Path(folder).iterdir())
            ]
            card = card_of(
                "circuit",
                circuit,
                repo_id,
                subfolder=subfolder,
                picture=model is not None,
                token=token,
                revision=revision,
            )
            if card is not None:
                operations.append(CommitOperationAdd("README.md", card.encode()))
            return api.create_commit(
                repo_id,
                operations,
                commit_message=commit_message or f"Upload the circuit for {circuit.task}",
                revision=revision,
            )


def with_base_model(
    circuit: "Circuit", base_model: str | None, base_model_revision: str | None, api: HfApi
) -> "Circuit":
    """The circuit, naming its model as others can find it: Hub id and commit hash, or nothing."""
    name = base_model or (circuit.model_name if is_hub_id(circuit.model_name) else "")
    if not name:
        warnings.warn(
            f"The circuit for {circuit.task!r} will name its model by the fingerprint "
            f"{circuit.model_fingerprint} only; pass base_model='user/name' for others to find it.",
            stacklevel=4,
        )
        return replace(circuit, model_name="", model_revision="")
    commit = circuit.model_revision if name == circuit.model_name else ""
    if base_model_revision or not commit:
        with hub_errors(name, revision=base_model_revision, token=api.token):
            commit = api.model_info(name, revision=base_model_revision).sha
    return replace(circuit, model_name=name, model_revision=commit)


def _refuse_to_replace(
    circuit: "Circuit",
    repo_id: str,
    subfolder: str,
    revision: str | None,
    token: str | bool | None,
) -> None:
    from .circuit import Circuit

    try:
        there = Circuit.from_pretrained(
            repo_id, subfolder=subfolder, revision=revision, token=token
        )
    except (HubAccessError, ValueError):
        return  # nothing there, or nothing that could be read
    if there.task != circuit.task:
        raise ValueError(
            f"{repo_id!r} holds the circuit for {there.task!r} in the folder {subfolder!r}, and "
            f"this one is for {circuit.task!r}; pass subfolder={circuit.task!r} to keep both."
        )
