"""The Hub's HTTP interface: requests, responses, and the function that answers each path."""

import base64
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, unquote

import yaml

from loopback_hub.hub import (
    GITATTRIBUTES,
    Commit,
    File,
    Hub,
    HubError,
    Repository,
    Token,
    goes_to_lfs,
)


@dataclass
class Request:
    """A request whose body has arrived.

    Attributes:
        path: as sent, percent-escapes and all.
        token: who asks; None without an Authorization header.
        url: where the Hub answers.
    """

    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    body: bytes
    url: str
    token: Token | None = None

    def json(self) -> Any:
        try:
            return json.loads(self.body)
        except ValueError as error:
            raise HubError(400, f"The body is not JSON: {error}") from error

    def flag(self, name: str) -> bool:
        return self.query.get(name, ["false"])[-1].lower() in ("true", "1")


@dataclass
class Response:
    """An answer."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


def as_json(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    headers = {"Content-Type": "application/json; charset=utf-8", **(headers or {})}
    return Response(status, json.dumps(content).encode(), headers)


# Method, pattern, function; the pattern's groups, unquoted, are its arguments.
ROUTES: list[tuple[str, re.Pattern, Callable[..., Any]]] = []
API = r"/api/(model|dataset|space)s/([^/]+/[^/]+)"
REVISION = r"([^/]+)"
WEB = r"/(?:(dataset|space)s/)?([^/]+/[^/]+)"  # models have no prefix in web addresses
SLUG = r"/api/collections/([^/]+/[^/]+)"


def route(method: str, pattern: str) -> Callable:
    def register(handler: Callable) -> Callable:
        ROUTES.append((method, re.compile(pattern), handler))
        return handler

    return register


def answer(hub: Hub, request: Request) -> Response | None:
    """The response, or None if no pattern fits."""
    method = "GET" if request.method == "HEAD" else request.method
    for expected, pattern, handler in ROUTES:
        match = pattern.fullmatch(request.path) if expected == method else None
        if match:
            arguments = [None if g is None else unquote(g) for g in match.groups()]
            content = handler(hub, request, *arguments)
            return content if isinstance(content, Response) else as_json(content)
    return None


# Accounts and repositories


@route("GET", "/api/whoami-v2")
def whoami(hub: Hub, request: Request) -> Any:
    if request.token is None:
        raise HubError(401, "Invalid username or password.")
    user = request.token.user
    auth = {"type": "access_token", "accessToken": {"role": request.token.role}}
    return {"type": "user", "id": user, "name": user, "fullname": user, "orgs": [], "auth": auth}


@route("POST", "/api/repos/create")
def create(hub: Hub, request: Request) -> Any:
    asked = request.json()
    if request.token is None:
        raise HubError(401, "Invalid username or password.")
    kind, user = asked.get("type") or "model", request.token.user
    namespace = asked.get("organization") or user
    repo_id = f"{namespace}/{asked['name']}"
    url = f"{request.url}{web_path(kind, repo_id)}"
    hub.require_write(request.token, namespace)
    if (kind, repo_id) in hub.repositories:
        raise HubError(409, f"You already created this {kind} repo: {repo_id}", url=url)
    private = asked.get("visibility") == "private" or bool(asked.get("private"))
    repository = Repository(kind, repo_id, private, sdk=asked.get("sdk"))
    repository.add_commit(
        "main", user, "initial commit", {".gitattributes": File(GITATTRIBUTES.encode())}
    )
    hub.repositories[kind, repo_id] = repository
    return {"url": url, "name": repo_id, "id": repo_id}


@route("PUT", f"{API}/settings")
def settings(hub: Hub, request: Request, kind: str, repo_id: str) -> Any:
    repository = hub.repository(kind, repo_id, request.token, "write")
    asked = request.json()
    if "visibility" in asked or "private" in asked:
        repository.private = asked.get("visibility") == "private" or bool(asked.get("private"))
    repository.gated = asked.get("gated", repository.gated)
    return {"private": repository.private, "gated": repository.gated}


@route("POST", f"{API}/tag/{REVISION}")
def create_tag(hub: Hub, request: Request, kind: str, repo_id: str, revision: str) -> Any:
    repository = hub.repository(kind, repo_id, request.token, "write")
    repository.refs[request.json()["tag"]] = repository.resolve(revision).id
    return {}


@route("GET", r"/api/(?:model|dataset|space)s/[^/]+")
@route("GET", r"/(?:(?:dataset|space)s/)?[^/]+/resolve/.+")
def without_namespace(hub: Hub, request: Request) -> Any:
    """The Hub has such repositories from its early days; here there are none."""
    raise HubError(404 if request.token else 401, "Repository not found", "RepoNotFound")


def web_path(kind: str, repo_id: str) -> str:
    return f"/{repo_id}" if kind == "model" else f"/{kind}s/{repo_id}"


# Cards


@route("POST", "/api/validate-yaml")
def validate_yaml(hub: Hub, request: Request) -> Response:
    """What the Hub checks of a README's header before a commit."""
    try:
        card = card_data(request.json()["content"])
    except yaml.YAMLError as error:
        return as_json({"errors": [{"message": f"YAML: {error}"}], "warnings": []}, 400)
    expected = {name: (str, list) for name in ("tags", "datasets", "metrics")}
    expected |= dict.fromkeys(("license", "library_name", "pipeline_tag"), str)
    errors = [
        {"message": f'"{name}" must be of another type'}
        for name, types in expected.items()
        if not isinstance(card.get(name, ""), types)
    ]
    return as_json({"errors": errors, "warnings": []}, 400 if errors else 200)


def card_data(readme: str) -> dict[str, Any]:
    """The YAML between the dashes at the top of a README; empty if there is none."""
    parts = readme.lstrip("\ufeff").split("---\n", 2)
    content = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0].strip() else None
    return content if isinstance(content, dict) else {}


def card_tags(card: dict[str, Any]) -> list[str]:
    """The tags by which the Hub finds a repository, made of its card's metadata."""

    def listed(name: str) -> list[str]:
        value = card.get(name) or []
        return [value] if isinstance(value, str) else value

    models = [f"base_model:{model}" for model in listed("base_model")]
    return [*listed("library_name"), *listed("tags"), *models]


# Listings


@route("GET", rf"{API}(?:/revision/{REVISION})?")
def info(hub: Hub, request: Request, kind: str, repo_id: str, revision: str | None) -> Any:
    repository = hub.repository(kind, repo_id, request.token)
    return describe(repository, repository.resolve(revision or "main"))


@route("GET", r"/api/(model|dataset|space)s")
def search(hub: Hub, request: Request, kind: str) -> Any:
    user = request.token.user if request.token else None
    author = request.query.get("author")
    found = [
        describe(repository, repository.resolve("main"))
        for (_, _), repository in sorted(hub.repositories.items())
        if repository.kind == kind
        and (not repository.private or repository.namespace == user)
        and (author is None or repository.namespace in author)
    ]
    asked = set(request.query.get("filter", []))
    return [described for described in found if asked <= set(described["tags"])]


@route("GET", f"{API}/tree/{REVISION}(?:/(.*))?")
def tree(
    hub: Hub, request: Request, kind: str, repo_id: str, revision: str, folder: str | None
) -> Any:
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
    return [entry(commit, path) for path in paths]


@route("POST", f"{API}/paths-info/{REVISION}")
def paths_info(hub: Hub, request: Request, kind: str, repo_id: str, revision: str) -> Any:
    repository = hub.repository(kind, repo_id, request.token, "content")
    commit = repository.resolve(revision)
    is_json = request.headers.get("content-type", "").startswith("application/json")
    asked = request.json() if is_json else parse_qs(request.body.decode())
    known = {*commit.files, *commit.folders()}
    paths = [path.strip("/") for path in asked.get("paths", [])]
    return [entry(commit, path) for path in paths if path in known]


@route("GET", f"{API}/commits/{REVISION}")
def commits(hub: Hub, request: Request, kind: str, repo_id: str, revision: str) -> Any:
    repository = hub.repository(kind, repo_id, request.token)
    commit: Commit | None = repository.resolve(revision)
    history = []
    while commit is not None:
        described = {"id": commit.id, "title": commit.title, "message": "", "date": commit.date}
        history.append({**described, "authors": [{"user": commit.author}]})
        commit = repository.commits.get(commit.parent or "")
    return history


def entry(commit: Commit, path: str) -> dict[str, Any]:
    """A file or folder as tree listings show it."""
    if path in commit.files:
        described = commit.files[path].described(path)
    else:
        oid = hashlib.sha1(f"{commit.id} {path}".encode()).hexdigest()
        described = {"type": "directory", "path": path, "oid": oid, "size": 0}
    last = {"id": commit.id, "title": commit.title, "date": commit.date}
    return described | {"lastCommit": last}


def describe(repository: Repository, commit: Commit) -> dict[str, Any]:
    """A repository as its page's data show it."""
    card = {}
    if "README.md" in commit.files:
        card = card_data(commit.files["README.md"].content.decode())
    siblings = [
        {"rfilename": path, "size": len(file.content), "blobId": file.oid}
        | file.lfs_fields("sha256")
        for path, file in sorted(commit.files.items())
    ]
    return {
        "_id": repository.id,
        "id": repository.id,
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
        "cardData": card,
        "siblings": siblings,
        "sdk": repository.sdk,
    }


# Downloads and uploads


@route("GET", rf"{WEB}/(?:resolve|raw)/{REVISION}/(.+)")
def resolve(
    hub: Hub, request: Request, prefix: str | None, repo_id: str, revision: str, path: str
) -> Response:
    repository = hub.repository(prefix or "model", repo_id, request.token, "content")
    commit = repository.resolve(revision)
    file = repository.file(commit, path)
    headers = {"X-Repo-Commit": commit.id, "ETag": f'"{file.etag}"', "Accept-Ranges": "bytes"}
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
    if asked is None:
        return Response(200, file.content, headers)
    size = len(file.content)
    start, end = int(asked[1]), min(int(asked[2] or size), size - 1) + 1
    if start >= end:
        return Response(416, b"", {"Content-Range": f"bytes */{size}"})
    headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
    return Response(206, file.content[start:end], headers)


@route("POST", f"{API}/preupload/{REVISION}")
def preupload(hub: Hub, request: Request, kind: str, repo_id: str, revision: str) -> Any:
    repository = hub.repository(kind, repo_id, request.token, "write")
    commit = repository.resolve(revision)
    answers = []
    for asked in request.json()["files"]:
        path = asked["path"]
        lfs = goes_to_lfs(path, base64.b64decode(asked.get("sample", "")))
        known = commit.files.get(path)
        mode = {"uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
        answers.append({"path": path, "oid": known.etag if known else None, **mode})
    return {"files": answers}


@route("POST", rf"{WEB}\.git/info/lfs/objects/batch")
def lfs_batch(hub: Hub, request: Request, prefix: str | None, repo_id: str) -> Any:
    hub.repository(prefix or "model", repo_id, request.token, "write")
    objects = []
    for asked in request.json()["objects"]:
        described = {"oid": asked["oid"], "size": asked["size"]}
        if asked["oid"] not in hub.objects:
            described["actions"] = {"upload": {"href": f"{request.url}/objects/{asked['oid']}"}}
        objects.append(described)
    return {"transfer": "basic", "objects": objects}


@route("PUT", r"/objects/([0-9a-f]{64})")
def upload(hub: Hub, request: Request, oid: str) -> Response:
    if hashlib.sha256(request.body).hexdigest() != oid:
        raise HubError(400, "The content does not have the SHA-256 it was announced with.")
    hub.objects[oid] = request.body
    return Response(200, b"", {"ETag": f'"{oid}"'})


@route("POST", f"{API}/commit/{REVISION}")
def commit(hub: Hub, request: Request, kind: str, repo_id: str, revision: str) -> Any:
    repository = hub.repository(kind, repo_id, request.token, "write")
    head = repository.resolve(revision)
    lines = [json.loads(line) for line in request.body.splitlines() if line.strip()]
    header = next(line["value"] for line in lines if line["key"] == "header")
    parent = header.get("parentCommit")
    if parent and not head.id.startswith(parent):
        raise HubError(412, "A commit has happened since. Please refresh and try again.")
    files = dict(head.files)
    for line in lines:
        apply_operation(hub, files, line["key"], line["value"])
    ref, pull_request = revision, {}
    if request.flag("create_pr"):
        number = 1 + sum(name.startswith("refs/pr/") for name in repository.refs)
        ref = f"refs/pr/{number}"
        url = f"{request.url}{web_path(kind, repo_id)}/discussions/{number}"
        pull_request = {"pullRequestUrl": url}
    made = repository.add_commit(ref, request.token.user, header["summary"], files, head.id)
    url = f"{request.url}{web_path(kind, repo_id)}/commit/{made.id}"
    return {"success": True, "commitOid": made.id, "commitUrl": url, **pull_request}


def apply_operation(hub: Hub, files: dict[str, File], key: str, value: dict[str, Any]) -> None:
    path = value.get("path", "")
    if key == "file":
        files[path] = File(base64.b64decode(value["content"]))
    elif key == "lfsFile":
        if value["oid"] not in hub.objects:
            raise HubError(400, f"LFS pointer of {path} points to a file that does not exist")
        files[path] = File(hub.objects[value["oid"]], lfs=True)
    elif key == "deletedFile":
        del files[path]
    elif key == "deletedFolder":
        for name in [name for name in files if name.startswith(path)]:
            del files[name]
    elif key != "header":
        raise HubError(400, f"Unknown operation: {key}")


# Collections


@route("POST", "/api/collections")
def create_collection(hub: Hub, request: Request) -> Any:
    asked = request.json()
    namespace, title = asked["namespace"], asked["title"]
    hub.require_write(request.token, namespace)
    slug = f"{namespace}/{title}-{hashlib.sha1(title.encode()).hexdigest()[:24]}"
    if slug in hub.collections:
        raise HubError(409, "A collection with this title exists already.", slug=slug)
    hub.collections[slug] = {
        "slug": slug,
        "title": title,
        "owner": {"name": namespace, "type": "user"},
        "description": asked.get("description"),
        "private": bool(asked.get("private")),
        "lastUpdated": "2026-01-01T00:00:00.000Z",
        "position": 0,
        "theme": "green",
        "upvotes": 0,
        "items": [],
    }
    return hub.collections[slug]


@route("GET", "/api/collections")
def search_collections(hub: Hub, request: Request) -> Any:
    return [
        {name: value for name, value in collection.items() if name != "position"}
        for collection in hub.collections.values()
        if collection["owner"]["name"] in request.query["owner"]
    ]


@route("GET", SLUG)
def get_collection(hub: Hub, request: Request, slug: str) -> Any:
    if slug not in hub.collections:
        raise HubError(404, "Collection not found")
    return hub.collections[slug]


@route("POST", f"{SLUG}/items?")
def add_item(hub: Hub, request: Request, slug: str) -> Any:
    hub.require_write(request.token, slug.split("/")[0])
    items, item = hub.collections[slug]["items"], request.json()["item"]
    hub.repository(item["type"], item["id"], request.token)
    if any((known["type"], known["id"]) == (item["type"], item["id"]) for known in items):
        raise HubError(409, f"{item['id']} is already in the collection.")
    items.append({**item, "_id": f"{len(items):024}", "position": len(items)})
    return hub.collections[slug]
