"""What there is: repositories, their files, references and commits."""

import hashlib
from typing import Any

import yaml

from tests.hub_server.errors import HubError
from tests.hub_server.hub import Hub
from tests.hub_server.repository import Commit, Repository
from tests.hub_server.routes.accounts import card_data
from tests.hub_server.routes.paths import API, HUB, REVISION
from tests.hub_server.wire import Request, Response


@HUB.route("GET", rf"{API}(?:/revision/{REVISION})?")
def info(hub: Hub, request: Request, kind: str, repo_id: str, revision: str | None) -> Response:
    repository = hub.repository(kind, repo_id, request.token)
    commit = repository.resolve(revision or "main")
    return Response.json(describe(hub, repository, commit, blobs=request.flag("blobs")))


@HUB.route("GET", r"/api/(model|dataset|space)s")
def search(hub: Hub, request: Request, kind: str) -> Response:
    query = request.query
    found = []
    for (its_kind, _), repository in sorted(hub.repositories.items()):
        names = hub.names_of(request.token.user) if request.token else []
        if its_kind != kind or (repository.private and repository.namespace not in names):
            continue
        described = describe(hub, repository, repository.resolve("main"))
        if (
            repository.namespace in query.get("author", [repository.namespace])
            and all(part in repository.id for part in query.get("search", []))
            and set(query.get("filter", [])) <= set(described["tags"])
        ):
            found.append(described)
    return Response.json(found[: int(query.get("limit", [len(found)])[-1])])


@HUB.route("GET", f"{API}/tree/{REVISION}(?:/(.*))?")
def tree(
    hub: Hub, request: Request, kind: str, repo_id: str, revision: str, folder: str | None
) -> Response:
    repository = hub.repository(kind, repo_id, request.token, "content")
    commit = repository.resolve(revision)
    folder = (folder or "").strip("/")
    if folder and folder not in commit.folders():
        headers = {"X-Repo-Commit": commit.id}
        raise HubError(404, f"{folder} does not exist on {revision}", "EntryNotFound", headers)
    prefix = f"{folder}/" if folder else ""
    paths = sorted(p for p in {*commit.files, *commit.folders()} if p.startswith(prefix))
    if not request.flag("recursive"):
        paths = [path for path in paths if "/" not in path[len(prefix) :]]
    start = int(request.query.get("cursor", ["0"])[0])
    page = paths[start : start + hub.page_size]
    entries = [entry(commit, path, expand=request.flag("expand")) for path in page]
    response = Response.json(entries)
    if start + hub.page_size < len(paths):
        flags = "".join(f"{n}={request.flag(n)}&" for n in ("recursive", "expand"))
        target = f"{request.hub_url}{request.path}?{flags}cursor={start + hub.page_size}"
        response.headers["Link"] = f'<{target}>; rel="next"'
    return response


@HUB.route("POST", f"{API}/paths-info/{REVISION}")
def paths_info(hub: Hub, request: Request, kind: str, repo_id: str, revision: str) -> Response:
    repository = hub.repository(kind, repo_id, request.token, "content")
    commit = repository.resolve(revision)
    asked = request.parameters()
    expand = asked.get("expand", ["false"])[-1].lower() == "true"
    known = {*commit.files, *commit.folders()}
    paths = [path.strip("/") for path in asked.get("paths", [])]
    return Response.json([entry(commit, p, expand=expand) for p in paths if p in known])


@HUB.route("GET", f"{API}/refs")
def refs(hub: Hub, request: Request, kind: str, repo_id: str) -> Response:
    repository = hub.repository(kind, repo_id, request.token)

    def listed(names: dict[str, str], where: str) -> list[dict[str, str]]:
        return [
            {"name": name, "ref": f"refs/{where}/{name}", "targetCommit": oid}
            for name, oid in names.items()
        ]

    return Response.json(
        {
            "branches": listed(repository.branches, "heads"),
            "tags": listed(repository.tags, "tags"),
            "converts": [],
            "pullRequests": [],
        }
    )


@HUB.route("GET", f"{API}/commits/{REVISION}")
def commits(hub: Hub, request: Request, kind: str, repo_id: str, revision: str) -> Response:
    repository = hub.repository(kind, repo_id, request.token)
    commit: Commit | None = repository.resolve(revision)
    history = []
    while commit is not None:
        history.append(
            {
                "id": commit.id,
                "title": commit.title,
                "message": commit.description,
                "date": commit.date,
                "authors": [{"user": commit.author}],
            }
        )
        commit = repository.commits.get(commit.parent or "")
    return Response.json(history)


def entry(commit: Commit, path: str, expand: bool) -> dict[str, Any]:
    """A file or folder as tree listings show it."""
    if path in commit.files:
        described = commit.files[path].as_json(path)
    else:
        inside = [(p, f.oid) for p, f in sorted(commit.files.items()) if p.startswith(path + "/")]
        oid = hashlib.sha1(repr(inside).encode()).hexdigest()
        described = {"type": "directory", "path": path, "oid": oid, "size": 0}
    if expand:
        described["lastCommit"] = {"id": commit.id, "title": commit.title, "date": commit.date}
    return described


def describe(
    hub: Hub, repository: Repository, commit: Commit, blobs: bool = False
) -> dict[str, Any]:
    """A repository as its page's data show it."""
    card = readme_data(hub, commit)
    siblings = []
    for path, file in sorted(commit.files.items()):
        sibling = {"rfilename": path}
        if blobs:
            described = file.as_json(path)
            sibling |= {"size": file.size, "blobId": file.oid}
            if "lfs" in described:
                lfs = described["lfs"]
                sibling["lfs"] = {
                    "sha256": lfs["oid"],
                    "size": lfs["size"],
                    "pointerSize": lfs["pointerSize"],
                }
        siblings.append(sibling)
    return {
        "_id": repository.id,
        "id": repository.id,
        f"{repository.kind}Id": repository.id,
        "author": repository.namespace,
        "sha": commit.id,
        "lastModified": commit.date,
        "createdAt": commit.date,
        "private": repository.private,
        "gated": repository.gated,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": card_tags(card),
        "pipeline_tag": card.get("pipeline_tag"),
        "library_name": card.get("library_name"),
        "cardData": card,
        "siblings": siblings,
        "sdk": repository.sdk,
    }


def readme_data(hub: Hub, commit: Commit) -> dict[str, Any]:
    if "README.md" not in commit.files:
        return {}
    try:
        text = hub.blobs.read(commit.files["README.md"]).decode()
        return card_data(text) or {}
    except (yaml.YAMLError, UnicodeDecodeError):
        return {}


def card_tags(card: dict[str, Any]) -> list[str]:
    """The tags by which the Hub finds a repository, made of its card's metadata."""

    def listed(name: str) -> list[str]:
        value = card.get(name) or []
        return [value] if isinstance(value, str) else value

    tags = [*listed("library_name"), *listed("tags"), *listed("pipeline_tag")]
    tags += [f"license:{name}" for name in listed("license")]
    tags += [f"dataset:{name}" for name in listed("datasets")]
    for model in listed("base_model"):
        tags += [f"base_model:{model}"]
        if card.get("base_model_relation"):
            tags += [f"base_model:{card['base_model_relation']}:{model}"]
    return list(dict.fromkeys(tags))
