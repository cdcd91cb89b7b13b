"""Uploads: how each file is to be sent, the LFS protocol, and the commit."""

import base64
import json
from typing import Any

from tests.hub_server.errors import HubError
from tests.hub_server.hub import Hub
from tests.hub_server.repository import Commit, File, git_hash, lfs_pointer
from tests.hub_server.routes.paths import API, HUB, REVISION, WEB, kind_of, web_path
from tests.hub_server.wire import Request, Response


@HUB.route("POST", f"{API}/preupload/{REVISION}")
def preupload(hub: Hub, request: Request, kind: str, repo_id: str, revision: str) -> Response:
    repository = hub.repository(kind, repo_id, request.token, "write")
    commit = repository.resolve(revision)
    answers = []
    for asked in request.json()["files"]:
        sample = base64.b64decode(asked.get("sample", ""))
        lfs = repository.goes_to_lfs(commit, asked["path"], asked["size"], sample)
        known = commit.files.get(asked["path"])
        answers.append(
            {
                "path": asked["path"],
                "uploadMode": "lfs" if lfs else "regular",
                "shouldIgnore": False,
                "oid": known.etag if known else None,
            }
        )
    return Response.json({"files": answers})


@HUB.route("POST", rf"{WEB}\.git/info/lfs/objects/batch")
def lfs_batch(hub: Hub, request: Request, prefix: str | None, repo_id: str) -> Response:
    repository = hub.repository(kind_of(prefix), repo_id, request.token, "write")
    asked = request.json()
    part = hub.multipart_threshold
    objects = []
    for wanted in asked["objects"]:
        oid, size = wanted["oid"], wanted["size"]
        answer: dict[str, Any] = {"oid": oid, "size": size}
        if not hub.blobs.has_lfs(oid):
            storage = f"{request.storage_url}/objects/{oid}"
            if size > part and "multipart" in asked.get("transfers", []):
                parts = -(-size // part)
                header = {str(n): f"{storage}/{n}?signature=signed" for n in range(1, parts + 1)}
                upload = {
                    "href": f"{request.hub_url}/api/complete_multipart/{oid}/{parts}",
                    "header": {"chunk_size": str(part), **header},
                }
            else:
                upload = {"href": f"{storage}?signature=signed"}
            verify = f"{request.hub_url}{web_path(repository.kind, repo_id)}.git/info/lfs/verify"
            answer["actions"] = {"upload": upload, "verify": {"href": verify}}
        objects.append(answer)
    return Response.json({"transfer": "basic", "objects": objects})


@HUB.route("POST", r"/api/complete_multipart/([0-9a-f]{64})/(\d+)")
def complete_multipart(hub: Hub, request: Request, oid: str, parts: str) -> Response:
    listed = request.json()
    if listed["oid"] != oid or [p["partNumber"] for p in listed["parts"]] != [
        *range(1, int(parts) + 1)
    ]:
        raise HubError(400, "The parts listed are not those that were asked for.")
    paths = [hub.folder / "parts" / f"{oid}.{part['partNumber']}" for part in listed["parts"]]
    if not all(path.is_file() for path in paths):
        raise HubError(400, "A part is missing.")
    hub.blobs.put_lfs(oid, b"".join(path.read_bytes() for path in paths))
    for path in paths:
        path.unlink()
    return Response.json({})


@HUB.route("POST", rf"{WEB}\.git/info/lfs/verify")
def lfs_verify(hub: Hub, request: Request, prefix: str | None, repo_id: str) -> Response:
    hub.repository(kind_of(prefix), repo_id, request.token, "write")
    asked = request.json()
    if not hub.blobs.has_lfs(asked["oid"]):
        raise HubError(404, "The object was not uploaded.")
    if len(hub.blobs.read_lfs(asked["oid"])) != asked["size"]:
        raise HubError(400, "The object has another size.")
    return Response.json({})


@HUB.route("POST", f"{API}/commit/{REVISION}")
def commit(hub: Hub, request: Request, kind: str, repo_id: str, revision: str) -> Response:
    repository = hub.repository(kind, repo_id, request.token, "write")
    if request.flag("create_pr"):
        raise HubError(501, "This server has no pull requests.")
    if revision not in repository.branches:
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
    head = repository.resolve(revision)
    lines = [json.loads(line) for line in request.body.splitlines() if line.strip()]
    header = next((line["value"] for line in lines if line["key"] == "header"), None)
    if header is None or not header.get("summary"):
        raise HubError(400, "A commit needs a header with a summary.")
    parent = header.get("parentCommit")
    if parent and not head.id.startswith(parent):
        raise HubError(412, "A commit has happened since. Please refresh and try again.")
    files = dict(head.files)
    for line in lines:
        apply_operation(hub, head, files, line["key"], line["value"])
    made = repository.add_commit(
        revision, request.token.user, header["summary"], header.get("description", ""), files
    )
    url = f"{request.hub_url}{web_path(kind, repo_id)}/commit/{made.id}"
    return Response.json({"success": True, "commitOid": made.id, "commitUrl": url})


def apply_operation(
    hub: Hub, head: Commit, files: dict[str, File], key: str, value: dict[str, Any]
) -> None:
    path = value.get("path", "").strip("/")
    if key == "header":
        return
    if not path or any(part in ("", ".", "..", ".git") for part in path.split("/")):
        raise HubError(400, f"Invalid path: {path!r}")
    if key == "file":
        if value.get("encoding") != "base64":
            raise HubError(400, "The content of a file must be base64.")
        content = base64.b64decode(value["content"])
        files[path] = File(hub.blobs.put_git(content), len(content))
    elif key == "lfsFile":
        oid = value["oid"]
        if not hub.blobs.has_lfs(oid):
            raise HubError(400, f"LFS pointer of {path} points to a file that does not exist")
        size = len(hub.blobs.read_lfs(oid))
        files[path] = File(git_hash(lfs_pointer(oid, size)), size, oid)
    elif key == "deletedFile":
        if path not in files:
            raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
        del files[path]
    elif key == "deletedFolder":
        for name in [name for name in files if name.startswith(f"{path}/")]:
            del files[name]
    else:
        raise HubError(400, f"Unknown operation: {key}")
