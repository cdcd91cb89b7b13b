"""What the server knows: who may do what, with which repositories and collections."""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from tests.hub_server.errors import HubError, repository_not_found
from tests.hub_server.repository import GITATTRIBUTES, BlobStore, File, Repository

Role = Literal["read", "write"]


@dataclass(frozen=True)
class Token:
    """An access token: whose it is and what it allows."""

    user: str
    role: Role


@dataclass
class Hub:
    """All state of the server; what must outlive it lies in `folder`.

    Attributes:
        tokens: access token → whose and what for.
        organizations: user → organizations in whose name they may write.
        page_size: entries per page of a tree listing.
        multipart_threshold: LFS files larger than this go up in parts of this size, in bytes.
    """

    folder: Path
    tokens: dict[str, Token] = field(default_factory=dict)
    organizations: dict[str, list[str]] = field(default_factory=dict)
    page_size: int = 1000
    multipart_threshold: int = 5 << 20

    def __post_init__(self) -> None:
        self.blobs = BlobStore(self.folder / "blobs")
        self.repositories: dict[tuple[str, str], Repository] = {}
        for path in sorted((self.folder / "repositories").glob("*/*/*/repository.json")):
            repository = Repository.load(path.parent)
            self.repositories[repository.kind, repository.id] = repository
        self.collections: dict[str, dict[str, Any]] = {}
        if self._collections_file.is_file():
            self.collections = json.loads(self._collections_file.read_text())

    # Who is asking

    def token(self, secret: str | None) -> Token | None:
        if secret is None:
            return None
        if secret not in self.tokens:
            raise HubError(401, "Invalid credentials in Authorization header")
        return self.tokens[secret]

    def names_of(self, user: str) -> list[str]:
        """The namespaces a user may write to."""
        return [user, *self.organizations.get(user, [])]

    def require_write(self, token: Token | None, namespace: str) -> Token:
        if token is None:
            raise HubError(401, "Invalid username or password.")
        if token.role != "write":
            raise HubError(403, "Forbidden: you must use a write token to upload to a repository.")
        if namespace not in self.names_of(token.user):
            raise HubError(
                403,
                f"You don't have the rights to create or change anything in the namespace "
                f'"{namespace}"',
            )
        return token

    # Repositories

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
        member = (
            repository is not None
            and token is not None
            and repository.namespace in self.names_of(token.user)
        )
        if repository is None or (repository.private and not member):
            raise repository_not_found(token is not None)
        if need == "content" and repository.gated and not member:
            if token is None:
                message = (
                    f"Access to {kind} {repo_id} is restricted. You must have access to it and be "
                    "authenticated to access it. Please log in."
                )
                raise HubError(401, message, "GatedRepo")
            if token.user not in repository.granted:
                message = (
                    f"Access to {kind} {repo_id} is restricted and you are not in the authorized "
                    "list. Visit its page to ask for access."
                )
                raise HubError(403, message, "GatedRepo")
        if need == "write":
            self.require_write(token, repository.namespace)
        return repository

    def create_repository(
        self, kind: str, repo_id: str, author: str, *, private: bool = False, sdk: str | None = None
    ) -> Repository:
        folder = self.folder / "repositories" / kind / repo_id
        repository = Repository(kind, repo_id, folder, private=private, sdk=sdk)
        attributes = GITATTRIBUTES.encode()
        files = {".gitattributes": File(self.blobs.put_git(attributes), len(attributes))}
        repository.add_commit("main", author, "initial commit", "", files)
        self.repositories[kind, repo_id] = repository
        return repository

    def delete_repository(self, repository: Repository) -> None:
        del self.repositories[repository.kind, repository.id]
        shutil.rmtree(repository.folder)

    def move_repository(self, repository: Repository, repo_id: str) -> None:
        self.delete_repository(repository)
        repository.id = repo_id
        repository.folder = self.folder / "repositories" / repository.kind / repo_id
        repository.save()
        self.repositories[repository.kind, repo_id] = repository

    # Collections

    @property
    def _collections_file(self) -> Path:
        return self.folder / "collections.json"

    def save_collection(self, collection: dict[str, Any]) -> None:
        collection["lastUpdated"] = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        self.collections[collection["slug"]] = collection
        self._write_collections()

    def delete_collection(self, slug: str) -> None:
        del self.collections[slug]
        self._write_collections()

    def _write_collections(self) -> None:
        temporary = self.folder / ".collections.json.tmp"
        temporary.write_text(json.dumps(self.collections))
        os.replace(temporary, self._collections_file)


def object_id(*parts: Any) -> str:
    """24 hexadecimal digits, as the Hub's database names things."""
    return hashlib.sha1(repr(parts).encode()).hexdigest()[:24]
