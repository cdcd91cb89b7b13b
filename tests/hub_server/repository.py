"""One repository: files, commits, branches and tags, kept in a folder."""

import fnmatch
import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from tests.hub_server.errors import HubError

# What a new repository's .gitattributes sends to LFS, as on the Hub.
LFS_PATTERNS = ("*.safetensors", "*.bin", "*.pt", "*.parquet", "*.arrow", "*.npz", "*.tar", "*.zip")
GITATTRIBUTES = "".join(f"{p} filter=lfs diff=lfs merge=lfs -text\n" for p in LFS_PATTERNS)
LARGEST_REGULAR_FILE = 10 << 20


@dataclass(frozen=True)
class File:
    """A file at a commit: `oid` is git's id of the blob or, for LFS, of its pointer."""

    oid: str
    size: int
    sha256: str | None = None

    @property
    def etag(self) -> str:
        return self.sha256 or self.oid

    def as_json(self, path: str) -> dict[str, Any]:
        entry = {"type": "file", "path": path, "oid": self.oid, "size": self.size}
        if self.sha256:
            pointer = len(lfs_pointer(self.sha256, self.size))
            entry["lfs"] = {"oid": self.sha256, "size": self.size, "pointerSize": pointer}
        return entry


@dataclass
class Commit:
    """A commit and all files in it."""

    id: str
    parent: str | None
    author: str
    title: str
    description: str
    date: str
    files: dict[str, File]

    def folders(self) -> set[str]:
        return {
            "/".join(parts[:n])
            for parts in (path.split("/") for path in self.files)
            for n in range(1, len(parts))
        }


class BlobStore:
    """Bytes by their hash: `git/<sha1>` and `lfs/<sha256>`."""

    def __init__(self, folder: Path):
        self.folder = folder
        for kind in ("git", "lfs"):
            (folder / kind).mkdir(parents=True, exist_ok=True)

    def put_git(self, content: bytes) -> str:
        oid = git_hash(content)
        self._write(self.folder / "git" / oid, content)
        return oid

    def put_lfs(self, sha256: str, content: bytes) -> None:
        if hashlib.sha256(content).hexdigest() != sha256:
            raise HubError(400, "The content does not have the SHA-256 it was announced with.")
        self._write(self.folder / "lfs" / sha256, content)

    def has_lfs(self, sha256: str) -> bool:
        return (self.folder / "lfs" / sha256).is_file()

    def read(self, file: File) -> bytes:
        if file.sha256:
            return self.read_lfs(file.sha256)
        return (self.folder / "git" / file.oid).read_bytes()

    def read_lfs(self, sha256: str) -> bytes:
        return (self.folder / "lfs" / sha256).read_bytes()

    @staticmethod
    def _write(path: Path, content: bytes) -> None:
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_bytes(content)
        os.replace(temporary, path)


@dataclass
class Repository:
    """A model, dataset or Space repository. `save` writes everything but the blobs.

    Attributes:
        kind: "model", "dataset" or "space".
        gated: False, or "auto" / "manual": only users in `granted` (and the owner's) see contents.
    """

    kind: str
    id: str
    folder: Path
    private: bool = False
    gated: str | bool = False
    granted: set[str] = field(default_factory=set)
    sdk: str | None = None
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    @property
    def namespace(self) -> str:
        return self.id.split("/")[0]

    def resolve(self, revision: str) -> Commit:
        """The commit of a branch, tag, full ref or commit hash.

        Raises:
            HubError: 404 with the code RevisionNotFound.
        """
        name = revision.removeprefix("refs/heads/").removeprefix("refs/tags/")
        oid = self.branches.get(name) or self.tags.get(name) or name
        if oid in self.commits:
            return self.commits[oid]
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def file(self, commit: Commit, path: str) -> File:
        """A file at a commit, or the 404 by which clients remember that there is none."""
        if path in commit.files:
            return commit.files[path]
        headers = {"X-Repo-Commit": commit.id}
        raise HubError(404, "Entry not found", "EntryNotFound", headers)

    def add_commit(
        self, branch: str, author: str, title: str, description: str, files: dict[str, File]
    ) -> Commit:
        """Put a commit with these files on top of a branch, which is made if it is the first."""
        parent = self.branches.get(branch)
        date = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        content = {path: file.etag for path, file in sorted(files.items())}
        name = json.dumps([self.kind, self.id, parent, len(self.commits), title, content])
        commit = Commit(
            hashlib.sha1(name.encode()).hexdigest(), parent, author, title, description, date, files
        )
        self.commits[commit.id] = commit
        self.branches[branch] = commit.id
        self.save()
        return commit

    def goes_to_lfs(self, commit: Commit, path: str, size: int, sample: bytes) -> bool:
        patterns = LFS_PATTERNS if ".gitattributes" in commit.files else ()
        name = path.rsplit("/", 1)[-1]
        by_name = any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
        return by_name or size > LARGEST_REGULAR_FILE or b"\0" in sample

    def save(self) -> None:
        state = {
            **{name: getattr(self, name) for name in self.STATE},
            "granted": sorted(self.granted),
            "commits": {oid: asdict(commit) for oid, commit in self.commits.items()},
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / ".repository.json.tmp"
        temporary.write_text(json.dumps(state))
        os.replace(temporary, self.folder / "repository.json")

    STATE = ("kind", "id", "private", "gated", "sdk", "branches", "tags")

    @classmethod
    def load(cls, folder: Path) -> "Repository":
        state = json.loads((folder / "repository.json").read_text())
        commits = {}
        for oid, commit in state.pop("commits").items():
            files = {path: File(**file) for path, file in commit.pop("files").items()}
            commits[oid] = Commit(files=files, **commit)
        granted = set(state.pop("granted"))
        return cls(folder=folder, granted=granted, commits=commits, **state)


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def lfs_pointer(sha256: str, size: int) -> bytes:
    text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"
    return text.encode()
