"""What the server knows: who may do what, with which repositories and collections."""

import fnmatch
import hashlib
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cached_property
from typing import Any, Literal

Role = Literal["read", "write"]

# What a new repository's .gitattributes sends to LFS, as on the Hub.
LFS_PATTERNS = ("*.safetensors", "*.bin", "*.pt", "*.parquet", "*.arrow", "*.npz", "*.tar", "*.zip")
GITATTRIBUTES = "".join(f"{p} filter=lfs diff=lfs merge=lfs -text\n" for p in LFS_PATTERNS)


class HubError(Exception):
    """An HTTP error as the Hub words it.

    Args:
        status: HTTP status.
        message: goes into the body and into `X-Error-Message`.
        code: goes into `X-Error-Code`; the clients tell errors apart by it.
        headers: further headers.
        body: further fields of the JSON body.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        headers: dict[str, str] | None = None,
        **body: Any,
    ) -> None:
        super().__init__(message)
        self.status, self.body = status, {"error": message, **body}
        self.headers = {"X-Error-Message": message, **(headers or {})}
        if code:
            self.headers["X-Error-Code"] = code


@dataclass(frozen=True)
class Token:
    """An access token: whose it is and what it allows."""

    user: str
    role: Role


@dataclass(frozen=True)
class File:
    """A file at a commit."""

    content: bytes
    lfs: bool = False

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def oid(self) -> str:
        """Git's id of the blob or, for LFS, of its pointer."""
        stored = self.content
        if self.lfs:
            pointer = f"oid sha256:{self.sha256}\nsize {len(self.content)}\n"
            stored = f"version https://git-lfs.github.com/spec/v1\n{pointer}".encode()
        return hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid

    def described(self, path: str) -> dict[str, Any]:
        size = len(self.content)
        entry = {"type": "file", "path": path, "oid": self.oid, "size": size}
        return entry | self.lfs_fields("oid")

    def lfs_fields(self, name: str) -> dict[str, Any]:
        pointer = {name: self.sha256, "size": len(self.content), "pointerSize": 134}
        return {"lfs": pointer} if self.lfs else {}


@dataclass
class Commit:
    """A commit and all files in it."""

    id: str
    parent: str | None
    author: str
    title: str
    date: str
    files: dict[str, File]

    def folders(self) -> set[str]:
        parts = [path.split("/") for path in self.files]
        return {"/".join(p[:n]) for p in parts for n in range(1, len(p))}


@dataclass
class Repository:
    """A model, dataset or Space repository.

    Attributes:
        kind: "model", "dataset" or "space".
        gated: False, or "auto" / "manual": only users in the owner's name see contents.
        refs: branch, tag or `refs/pr/N` → commit.
    """

    kind: str
    id: str
    private: bool = False
    gated: str | bool = False
    sdk: str | None = None
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    @property
    def namespace(self) -> str:
        return self.id.split("/")[0]

    def resolve(self, revision: str) -> Commit:
        name = revision.removeprefix("refs/heads/").removeprefix("refs/tags/")
        oid = self.refs.get(name, name)
        if oid not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[oid]

    def file(self, commit: Commit, path: str) -> File:
        """A file at a commit, or the 404 by which clients remember that there is none."""
        if path not in commit.files:
            raise HubError(404, "Entry not found", "EntryNotFound", {"X-Repo-Commit": commit.id})
        return commit.files[path]

    def add_commit(
        self, ref: str, author: str, title: str, files: dict[str, File], parent: str | None = None
    ) -> Commit:
        """Put a commit with these files on top of `parent`, and let a ref point to it."""
        date = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        content = [(path, file.etag) for path, file in sorted(files.items())]
        name = repr((self.kind, self.id, parent, len(self.commits), title, content))
        oid = hashlib.sha1(name.encode()).hexdigest()
        self.commits[oid] = Commit(oid, parent, author, title, date, files)
        self.refs[ref] = oid
        return self.commits[oid]


def goes_to_lfs(path: str, sample: bytes) -> bool:
    name = path.rsplit("/", 1)[-1]
    return any(fnmatch.fnmatch(name, pattern) for pattern in LFS_PATTERNS) or b"\0" in sample


@dataclass
class Hub:
    """All state of the server.

    Attributes:
        tokens: access token → whose and what for.
        objects: SHA-256 → content of what was uploaded by LFS.
    """

    tokens: dict[str, Token] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    repositories: dict[tuple[str, str], Repository] = field(default_factory=dict)
    collections: dict[str, dict[str, Any]] = field(default_factory=dict)

    def require_write(self, token: Token | None, namespace: str) -> Token:
        if token is None:
            raise HubError(401, "Invalid username or password.")
        if token.role != "write":
            raise HubError(403, "Forbidden: you must use a write token to upload to a repository.")
        if namespace != token.user:
            message = f'You don\'t have the rights to change anything in "{namespace}"'
            raise HubError(403, message)
        return token

    def repository(
        self,
        kind: str,
        repo_id: str,
        token: Token | None,
        need: Literal["exist", "content", "write"] = "exist",
    ) -> Repository:
        """A repository this token may see, read or write.

        Raises:
            HubError: 401 or 404 RepoNotFound, 401 or 403 GatedRepo, 403 without the right to write.
        """
        repository = self.repositories.get((kind, repo_id))
        user = token.user if token else None
        if repository is None or (repository.private and repository.namespace != user):
            # Private and missing repositories look the same from outside.
            raise HubError(404 if token else 401, "Repository not found", "RepoNotFound")
        if need == "content" and repository.gated and repository.namespace != user:
            message = f"Access to {kind} {repo_id} is restricted."
            raise HubError(403 if token else 401, message, "GatedRepo")
        if need == "write":
            self.require_write(token, repository.namespace)
        return repository
