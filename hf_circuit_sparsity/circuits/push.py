"""How the files of a circuit get onto the Hub."""

import warnings
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, ModelCard, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from ..hub_cards.card import MARK
from .card import circuit_card
from .circuit_file import PICTURE_NAME, circuit_folders, download_circuit, is_hub_id, read_circuit


def model_on_hub(
    content: Mapping[str, Any],
    base_model: str | None,
    base_model_revision: str | None,
    token: str | bool | None,
) -> tuple[str, str]:
    """Hub id and commit hash of a circuit's model; both empty, with a warning, if it has no id.

    Args:
        content: of `circuit.json`.
        base_model: Hub id; the one that the circuit names if not given.
        base_model_revision: branch, tag or commit hash; if not given, the commit that the circuit
            names, else the newest.
        token: access token.
    """
    name = base_model or (content["model_name"] if is_hub_id(content["model_name"]) else "")
    if not name:
        warnings.warn(
            f"The circuit for {content['task']!r} will name its model by the fingerprint "
            f"{content['model_fingerprint']} only; pass base_model='user/name' for others to find "
            "it.",
            stacklevel=3,
        )
        return "", ""
    commit = content["model_revision"] if name == content["model_name"] else ""
    if base_model_revision or not commit:
        commit = HfApi(token=token).model_info(name, revision=base_model_revision).sha
    return name, commit


def upload_circuit(
    folder: Path,
    content: Mapping[str, Any],
    repo_id: str,
    subfolder: str,
    *,
    private: bool,
    revision: str | None,
    token: str | bool | None,
    **commit: Any,
) -> CommitInfo:
    """Upload the files of a circuit and, where the repository's card is not a person's, a card.

    Args:
        folder: with the files, and a picture if there is one.
        content: of the `circuit.json` in there.
        repo_id: made if it is not there.

    The other arguments are those of [`Circuit.push_to_hub`].

    Raises:
        ValueError: another task's circuit lies there.
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    _refuse_to_replace(content["task"], repo_id, subfolder, revision, token)
    files = sorted(folder.iterdir())
    operations = [
        CommitOperationAdd(str(PurePosixPath(subfolder) / path.name), path) for path in files
    ]
    if _card_is_ours(repo_id, revision, token):
        info = api.model_info(repo_id, revision=revision)
        card = circuit_card(
            {subfolder: content},
            repo_id=repo_id,
            pictures=[subfolder] if PICTURE_NAME in {path.name for path in files} else [],
            others=[other for other in circuit_folders(info) if other != subfolder],
            mark=True,
        )
        operations.append(CommitOperationAdd("README.md", str(card).encode()))
    return api.create_commit(repo_id, operations, revision=revision, **commit)


def _card_is_ours(repo_id: str, revision: str | None, token: str | bool | None) -> bool:
    """Whether a repository has no card, or one that an earlier push of a circuit wrote."""
    try:
        path = hf_hub_download(repo_id, "README.md", revision=revision, token=token)
    except EntryNotFoundError:
        return True
    text = Path(path).read_text(encoding="utf-8")
    return MARK in text and "circuit" in (ModelCard(text).data.tags or ())


def _refuse_to_replace(
    task: str, repo_id: str, subfolder: str, revision: str | None, token: str | bool | None
) -> None:
    try:
        folder = download_circuit(repo_id, subfolder=subfolder, revision=revision, token=token)
        other = read_circuit(folder, from_hub=True)[0]["task"]
    except (FileNotFoundError, ValueError):
        return  # no circuit is there, or none that could be read
    if other != task:
        raise ValueError(
            f"{repo_id!r} holds the circuit for {other!r} in the folder {subfolder!r}, and this "
            f"one is for {task!r}; pass subfolder={task!r} to keep both."
        )
