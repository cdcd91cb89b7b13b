"""Downloads: `resolve`, which answers regular files itself and sends LFS files to the storage."""

from urllib.parse import quote

from tests.hub_server.hub import Hub
from tests.hub_server.routes.paths import HUB, REVISION, WEB, kind_of
from tests.hub_server.wire import Request, Response, ranged


@HUB.route("GET", rf"{WEB}/(?:resolve|raw)/{REVISION}/(.+)")
def resolve(
    hub: Hub, request: Request, prefix: str | None, repo_id: str, revision: str, path: str
) -> Response:
    kind = kind_of(prefix)
    repository = hub.repository(kind, repo_id, request.token, "content")
    commit = repository.resolve(revision)
    file = repository.file(commit, path)
    headers = {"X-Repo-Commit": commit.id}
    if file.sha256:
        headers["X-Linked-Size"] = str(file.size)
        headers["X-Linked-Etag"] = f'"{file.sha256}"'
        headers["Location"] = f"{request.storage_url}/objects/{file.sha256}?signature=signed"
        return Response(302, b"", headers)
    # As on the Hub: a relative redirect to an address that never changes.
    target = f"/api/resolve-cache/{kind}s/{repo_id}/{commit.id}/{quote(path, safe='')}"
    return Response(307, b"", {**headers, "Location": target, "ETag": f'"{file.oid}"'})


@HUB.route("GET", r"/api/resolve-cache/(model|dataset|space)s/([^/]+/[^/]+)/([^/]+)/(.+)")
def resolve_cache(
    hub: Hub, request: Request, kind: str, repo_id: str, revision: str, path: str
) -> Response:
    repository = hub.repository(kind, repo_id, request.token, "content")
    commit = repository.resolve(revision)
    file = repository.file(commit, path)
    page = path.endswith(".html")
    headers = {
        "X-Repo-Commit": commit.id,
        "ETag": f'"{file.oid}"',
        "Content-Type": "text/html; charset=utf-8" if page else "application/octet-stream",
    }
    return ranged(request, hub.blobs.read(file), headers)
