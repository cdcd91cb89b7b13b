"""`hf-circuit-sparsity publish`: a run becomes a model, circuits, tasks, a viewer and a collection.

The Hub's client does not send what is on the Hub already, and the files are the same every time. So
the same command goes on where it was stopped.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.utils import validate_repo_id

from ..files import check_can_write, scratch_folder
from ..tasks.load import check_tasks
from .console import columns, quiet_libraries, say
from .loading import reference_blocks
from .publication import UNKNOWN_COMMIT, Part, parts_of, read_run


def run_publish(
    run_dir: str,
    repo: str,
    *,
    dry_run: bool = False,
    public: bool = False,
    tasks: Sequence[str] | None = None,
    corpus: str | None = None,
) -> dict[str, str]:
    """Publish the folder of a run; the arguments are the command's.

    Returns:
        Web address of each part and of the collection, by what it is; empty in a dry run.

    Raises:
        ValueError: no such run, a bad name, or a circuit of another model.
        HfHubHTTPError: (an `OSError`) nobody is signed in, or there is no right to write; what was
            sent before is on the Hub, and the same call goes on.
    """
    quiet_libraries()
    validate_repo_id(repo)
    if "/" not in repo:
        raise ValueError(f"repo is {repo!r}, but a repository is named like user/name.")
    check_tasks(tasks or ())
    check_can_write(tempfile.gettempdir())
    run = read_run(run_dir)
    reference = reference_blocks(corpus, run.model, run.tokenizer)
    parts = parts_of(run, repo, tasks=tasks, reference=reference)
    with scratch_folder("hf-circuit-sparsity-publish-") as staging:
        if dry_run:
            _list(parts, staging)
            return {}
        addresses = _upload(parts, staging, public)
    addresses["collection"] = _collect(parts, repo, public)
    width = max(map(len, addresses))
    say("\nPublished" + (":" if public else ", privately unless it was there:"))
    for what, address in addresses.items():
        say(f"  {what:<{width}}  {address}")
    return addresses


def files_of(folder: Path) -> list[tuple[str, int]]:
    """Path and size in bytes of every file below a folder."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return [(path.relative_to(folder).as_posix(), path.stat().st_size) for path in paths]


def _list(parts: Sequence[Part], staging: Path) -> None:
    total = 0
    for part in parts:
        folder = _laid_out(part, staging, UNKNOWN_COMMIT)
        files = files_of(folder)
        size = sum(bytes_ for _, bytes_ in files)
        total += size
        say(f"\n{part.what} → {part.kind} {part.repo_id}, {len(files)} files, {size:,} bytes")
        say(columns(("file", "bytes"), [(path, f"{bytes_:,}") for path, bytes_ in files]))
    say(f"\n{total:,} bytes in all, and a collection that ties them. Nothing was sent.")


def _upload(parts: Sequence[Part], staging: Path, public: bool) -> dict[str, str]:
    api = HfApi()
    addresses, commit = {}, UNKNOWN_COMMIT
    for number, part in enumerate(parts, 1):
        say(f"{number}/{len(parts) + 1}  {part.what} → {part.kind} {part.repo_id}")
        address = api.create_repo(
            part.repo_id, repo_type=part.kind, private=not public,
            space_sdk="static" if part.kind == "space" else None, exist_ok=True,
        )  # fmt: skip
        info = api.repo_info(part.repo_id, repo_type=part.kind)
        if info.private == public:
            say(f"     was there before, and stays {'private' if info.private else 'public'}")
        folder = _laid_out(part, staging, commit)
        size = sum(bytes_ for _, bytes_ in files_of(folder))
        done = api.upload_folder(
            repo_id=part.repo_id,
            repo_type=part.kind,
            folder_path=folder,
            commit_message=f"Publish the {part.what}",
        )
        same = done.oid == info.sha
        say(f"     {size:,} bytes" + (", all there already" if same else ""))
        if part.what == "model":
            commit = done.oid
        addresses[part.what] = str(address)
    return addresses


def _collect(parts: Sequence[Part], repo: str, public: bool) -> str:
    namespace, name = repo.split("/")
    title = name[:60]  # as much as the Hub allows
    say(f"{len(parts) + 1}/{len(parts) + 1}  collection {title}")
    api = HfApi()
    collection = api.create_collection(
        title,
        namespace=namespace,
        description=f"The weight-sparse model {repo} and its circuits"[:150],
        private=not public,
        exists_ok=True,
    )
    for part in parts:
        api.add_collection_item(collection.slug, part.repo_id, part.kind, exists_ok=True)
    return collection.url


def _laid_out(part: Part, staging: Path, commit: str) -> Path:
    folder = staging / part.what
    folder.mkdir()
    part.lay_out(folder, commit)
    return folder
