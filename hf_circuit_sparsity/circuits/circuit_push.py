"""How a circuit gets onto the Hub."""

import os
import shutil
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi

from ..hub.errors import HubAccessError, hub_errors
from ..modeling.hub_slot import card_of
from .circuit_file import PICTURE_NAME, is_hub_id

if TYPE_CHECKING:
    from .circuit import Circuit


class CircuitPushMixin:
    """Gives [`Circuit`] its `push_to_hub`."""

    def push_to_hub(
        self,
        repo_id: str,
        *,
        subfolder: str = "",
        base_model: str | None = None,
        base_model_revision: str | None = None,
        picture: str | os.PathLike | None = None,
        private: bool | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        commit_message: str | None = None,
    ) -> CommitInfo:
        """Upload the circuit to the Hub, into a repository that is made if it is not there.

        Args:
            repo_id: `user/name`.
            subfolder: folder in the repository; with it, one repository holds several circuits.
            base_model: Hub id of the model it was cut out of. Not needed if the model was loaded
                from the Hub before the circuit was found.
            base_model_revision: branch, tag or commit hash of that model; the commit hash is
                recorded. Default: the commit it was loaded at, else the newest.
            picture: PNG of the circuit, as [`plot_circuit`] draws it; uploaded beside it.
            private: whether a new repository is private.
            revision: branch to write to.
            token: access token; the saved one if not given.
            commit_message: of the one commit made.

        Raises:
            HubAccessError: (an `OSError`) nobody is signed in, there is no right to write, or the
                base model is not there.
            ValueError: another task's circuit lies there, or there is no
                such picture.
        """
        if picture is not None and not Path(picture).is_file():
            raise ValueError(
                f"picture={os.fspath(picture)!r} was passed, but there is no such file."
            )
        if {"..", "/"} & set(PurePosixPath(subfolder).parts):
            raise ValueError(
                f"subfolder={subfolder!r} was passed, but it must be a folder in the repository."
            )
        api = HfApi(token=token)
        circuit = with_base_model(self, base_model, base_model_revision, api)
        with (
            tempfile.TemporaryDirectory() as folder,
            hub_errors(repo_id, revision=revision, token=token, writing=True),
        ):
            circuit.save_pretrained(folder)
            if picture is not None:
                shutil.copyfile(picture, Path(folder) / PICTURE_NAME)
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            _refuse_to_replace(circuit, repo_id, subfolder, revision, token)
            operations = [
                CommitOperationAdd(str(PurePosixPath(subfolder) / path.name), path)
                for path in sorted(Path(folder).iterdir())
            ]
            where = {"subfolder": subfolder, "token": token, "revision": revision}
            card = card_of("circuit", circuit, repo_id, picture=picture is not None, **where)
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
            stacklevel=3,
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
    try:
        there = type(circuit).from_pretrained(
            repo_id, subfolder=subfolder, revision=revision, token=token
        )
    except (HubAccessError, ValueError):
        return  # nothing there, or nothing that could be read
    if there.task != circuit.task:
        raise ValueError(
            f"{repo_id!r} holds the circuit for {there.task!r} in the folder {subfolder!r}, and "
            f"this one is for {circuit.task!r}; pass subfolder={circuit.task!r} to keep both."
        )
