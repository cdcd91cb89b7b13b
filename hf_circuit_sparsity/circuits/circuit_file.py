"""How a circuit is stored: `circuit.json` and `circuit.safetensors`, checked on both ways.

A task of one's own lies beside them, as `task.json`.

What is written passes the same checks as what is read, so what could be written can be read.
"""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from huggingface_hub import HfApi, ModelInfo, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors.torch import save_file

from ..files import replacing_together, sha256_of
from ..modeling.configuration_circuitgpt import ArtifactError
from ..modeling.sparse_checkpoint import read_tensors
from ..modeling.validation import Field, check_vector, read_json
from ..tasks.text import FILE_NAME as TASK_NAME
from ..tasks.text import TaskText, read_task_text
from .evaluation.checks import holds

FORMAT_VERSION = 2
_READABLE = (1, 2)  # 1 had neither pruned edges, pruned tokens nor a verification
JSON_NAME = "circuit.json"
TENSORS_NAME = "circuit.safetensors"
PICTURE_NAME = "circuit.png"
PARTS = "files"  # of `circuit.json`: the hashes of the files beside it that belong to it
# No field may ask for more; far above any model's.
MAX_INDEX = 2**31 - 1
_SITE = (r"[A-Za-z0-9_]{1,60}(\.[A-Za-z0-9_]{1,60}){0,8}", "names joined by dots")
_NODE = (_SITE[0] + r"\.(0|[1-9][0-9]{0,8})", "a site and an index, joined by a dot")
_INDEX = ("0|[1-9][0-9]{0,8}", "an index in decimal digits")
_COMMIT = ("([0-9a-f]{40})?", "a commit hash or empty")
_SHA256 = ("[0-9a-f]{64}", "64 hexadecimal digits")
_FINGERPRINT = ("[0-9a-f]{16}", "16 hexadecimal digits")

Check = Callable[[Field], Any]


def _object_of(check: Check, names: tuple[str, str] | None = None) -> Check:
    """A check of an object: every value by `check`, every name by a pattern."""

    def check_object(field: Field) -> None:
        for name, value in field.items():
            if names is not None:
                Field(name, field.path, f"a name in {field.name}").matching(*names)
            check(value)

    return check_object


def _or_null(check: Check) -> Check:
    return lambda field: None if field.value is None else check(field)


def _indices(field: Field) -> None:
    field.integers(0, MAX_INDEX)


def _calibration(field: Field) -> None:
    field["scale"].number()
    _object_of(Field.number, _INDEX)(field["shift"])


def _example(field: Field) -> None:
    for name, value in field.items():
        if name.endswith("token_ids"):
            _indices(value)
        elif name.endswith("target_id"):
            value.integer(0, MAX_INDEX)
        else:
            value.text()


def _edges(field: Field) -> None:
    for edge in field.elements():
        parts = list(edge.elements())
        if len(parts) != 4:
            edge.fail("a site, an index, a site and an index")
        for site, index in (parts[:2], parts[2:]):
            site.matching(*_SITE)
            index.integer(0, MAX_INDEX)


_REQUIRED: dict[str, Check] = {
    "task": Field.name_of_folder,
    "model_name": Field.line,
    "model_fingerprint": lambda field: field.matching(*_FINGERPRINT),
    "nodes": _object_of(_indices, _SITE),
    "calibration": _calibration,
    "metrics": _object_of(Field.number),
    "config": _object_of(Field.plain),
    "example": _example,
}
_OPTIONAL: dict[str, Check] = {
    "model_revision": lambda field: field.matching(*_COMMIT),
    "kept_edges": _or_null(_edges),
    "edge_offsets": _object_of(_object_of(Field.number, _INDEX), _SITE),
    "tokens": _or_null(_indices),
    "verification": _object_of(_object_of(Field.number)),
    "own_task": Field.boolean,
    "names": _object_of(lambda field: field.line(80), _NODE),
    "notes": _object_of(lambda field: field.text(4096), _NODE),
    PARTS: _object_of(lambda field: field.matching(*_SHA256)),
}


def check_content(content: Field) -> None:
    """Check every field of `circuit.json`.

    Raises:
        ArtifactError: names the file and the field.
    """
    for name, check in {**_REQUIRED, **_OPTIONAL}.items():
        if name in _REQUIRED or content.has(name):
            check(content[name])


def write_circuit(
    folder: str | os.PathLike,
    fields: dict[str, Any],
    tensors: dict[str, torch.Tensor],
    own_task: TaskText | None = None,
) -> None:
    """Write all files into a folder beside them, which are then moved into place together.

    `circuit.json` goes first and comes last, and has the hashes of the others, so that nodes of one
    circuit are never read with the means of another.

    Args:
        folder: made if it is not there.
        fields: of `circuit.json`, as [`read_circuit`] returns them.
        tensors: `means.SITE` and `scores.SITE`, float32 `(width,)`, and `token.mean`.
        own_task: the task, if it is not built in.

    Raises:
        ArtifactError: something could not be read back; nothing is written.
    """
    folder = Path(folder)
    content = {"format_version": FORMAT_VERSION, **fields}
    check_content(Field(content, folder / JSON_NAME))
    _check_tensors(tensors, folder / TENSORS_NAME)
    json.dumps(content, allow_nan=False)  # raises before anything is written
    with replacing_together(folder, JSON_NAME) as new:
        if own_task is not None:
            own_task.save(new)
        # Copies, as tensors that share memory are refused.
        copies = {name: tensor.clone() for name, tensor in tensors.items()}
        save_file(copies, new / TENSORS_NAME, metadata={"format": "pt"})
        content[PARTS] = {path.name: sha256_of(path) for path in sorted(new.iterdir())}
        text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
        (new / JSON_NAME).write_text(text + "\n", encoding="utf-8")


def read_circuit(
    folder: str | os.PathLike, *, from_hub: bool = False
) -> tuple[dict[str, Any], dict[str, dict[str, torch.Tensor]]]:
    """The fields of `circuit.json`, and the tensors as `{"means": {site: …}, "scores": {…}}` and,
    where tokens were pruned, `"token": {"mean": …}`.

    Args:
        folder: with the two files.
        from_hub: the folder was downloaded; the model's name may then not lead into folders here.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ArtifactError: a file is damaged or does not hold a circuit; names the file and the field.
    """
    folder = Path(folder)
    for name in (JSON_NAME, TENSORS_NAME):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder / name} was not found; a circuit is a folder with {JSON_NAME} and "
                f"{TENSORS_NAME}."
            )
    content = read_json(folder / JSON_NAME)
    version = content.value.get("format_version")
    if type(version) is not int or version not in _READABLE:
        raise ArtifactError(
            content.path,
            f" has format_version {version!r:.40}, but this library reads "
            f"{' and '.join(map(str, _READABLE))}; update the library or make the circuit anew.",
        )
    check_content(content)
    _check_parts(folder, content.value.pop(PARTS, {}))
    if from_hub and content["model_name"].value:
        content["model_name"].name_of_folder()
    tensors = read_tensors(folder / TENSORS_NAME)
    for check in content.value.get("verification", {}).values():
        if "threshold" in check:  # whether it passed its numbers say; a file may claim anything
            check["passed"] = float("value" in check and holds(check))
    return content.value, _check_tensors(tensors, folder / TENSORS_NAME)


def _check_parts(folder: Path, hashes: dict[str, str]) -> None:
    """Whether the files beside a `circuit.json` are those it was written with; an older one has no
    hashes, and there may be none of a task that has yet to be asked for."""
    for name in hashes.keys() & {TENSORS_NAME, TASK_NAME}:
        path = folder / name
        if path.is_file() and sha256_of(path) != hashes[name]:
            raise ArtifactError(
                path,
                f" is not the one that {JSON_NAME} beside it was saved with, as after a save that "
                "was interrupted; save the circuit again, or download both.",
            )


def read_own_task(folder: Path, content: dict[str, Any]) -> TaskText | None:
    """The task beside a circuit, where its `circuit.json` says that there is one.

    Raises:
        ArtifactError: it is missing or damaged, or has the name of a built-in task.
    """
    if not content.get("own_task"):
        return None
    try:
        return read_task_text(folder)
    except (ValueError, FileNotFoundError) as error:
        path = folder / TASK_NAME
        raise ArtifactError(path, f": {str(error).removeprefix(f'{path}: ')}") from error


def _check_tensors(
    tensors: dict[str, torch.Tensor], path: Path
) -> dict[str, dict[str, torch.Tensor]]:
    by_kind: dict[str, dict[str, torch.Tensor]] = {"means": {}, "scores": {}, "token": {}}
    for name, tensor in tensors.items():
        kind, _, site = name.partition(".")
        if kind not in by_kind or (kind == "token" and site != "mean"):
            raise ArtifactError(
                path,
                f" has {name[:80]!r}, expected vectors named means.*, scores.* and token.mean.",
            )
        Field(site, path, f"a site in {kind}").matching(*_SITE)
        by_kind[kind][site] = check_vector(path, name, tensor)
    for site, scores in by_kind["scores"].items():
        mean = by_kind["means"].get(site)
        if mean is None or len(mean) != len(scores):
            raise ArtifactError(
                path,
                f": scores.{site} has {len(scores)} entries, but means.{site} has "
                f"{0 if mean is None else len(mean)}; they must be as many.",
            )
    return by_kind


def is_hub_id(name: str | os.PathLike) -> bool:
    """Whether a name has the form `user/name` and is no folder here."""
    name = os.fspath(name)
    part = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
    return re.fullmatch(f"{part}/{part}", name) is not None and not os.path.exists(name)


def model_source(model: Any) -> tuple[str, str]:
    """A model's path or Hub id, and its commit hash if it came from the Hub; "" where unknown."""
    config = getattr(model, "config", None)
    name = getattr(config, "_name_or_path", "") or ""
    return name, (getattr(config, "_commit_hash", "") or "") if is_hub_id(name) else ""


def model_text(fingerprint: str, name: str, revision: str) -> str:
    """A model for an error message: its fingerprint and, where known, name and commit."""
    at = f" at {revision[:12]}" if revision else ""
    return f"{fingerprint} ({name}{at})" if name else fingerprint


def circuit_folders(info: ModelInfo) -> list[str]:
    """The folders of a repository that hold a circuit; "" is its root."""
    files = {PurePosixPath(sibling.rfilename) for sibling in info.siblings or ()}
    circuits = [p for p in files if p.name == JSON_NAME and p.with_name(TENSORS_NAME) in files]
    return sorted("/".join(path.parent.parts) for path in circuits)


def download_circuit(
    repo_id: str,
    *,
    subfolder: str = "",
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
) -> Path:
    """A folder of the cache with the files of a circuit, all of the same commit.

    Raises:
        FileNotFoundError: the repository holds no circuit there.
        HfHubHTTPError: (an `OSError`) the repository or the revision is missing.
    """
    where: dict[str, Any] = {"subfolder": subfolder or None, "token": token}
    where |= {"cache_dir": cache_dir, "local_files_only": local_files_only}
    try:
        path = Path(hf_hub_download(repo_id, JSON_NAME, revision=revision, **where))
        commit = path.parents[len(PurePosixPath(subfolder).parts)].name
        hf_hub_download(repo_id, TENSORS_NAME, revision=commit, **where)
        if read_json(path).value.get("own_task"):
            hf_hub_download(repo_id, TASK_NAME, revision=commit, **where)
    except LocalEntryNotFoundError:
        raise
    except EntryNotFoundError as error:
        raise FileNotFoundError(_no_circuit(repo_id, subfolder, revision, token)) from error
    return path.parent


def _no_circuit(
    repo_id: str, subfolder: str, revision: str | None, token: str | bool | None
) -> str:
    info = HfApi(token=token).model_info(repo_id, revision=revision)
    at = f" in {subfolder!r}" if subfolder else " at its root"
    folders = [repr(folder) for folder in circuit_folders(info)]
    if folders:
        return f"{repo_id!r} holds no circuit{at}; pass subfolder= one of {', '.join(folders)}."
    return (
        f"{repo_id!r} holds no circuit (no {JSON_NAME} beside a {TENSORS_NAME}); pass the name of "
        "a repository of circuits."
    )
