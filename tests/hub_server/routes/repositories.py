"""Making, moving and deleting repositories, their settings, branches and tags."""

import re

from tests.hub_server.errors import HubError, repository_not_found
from tests.hub_server.hub import Hub
from tests.hub_server.routes.paths import API, HUB, REVISION, web_path
from tests.hub_server.wire import Request, Response

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")


@HUB.route("POST", "/api/repos/create")
def create(hub: Hub, request: Request) -> Response:
    asked = request.json()
    kind, name = asked.get("type") or "model", asked["name"]
    if request.token is None:
        raise HubError(401, "Invalid username or password.")
    repo_id = f"{asked.get('organization') or request.token.user}/{name}"
    url = request.hub_url + web_path(kind, repo_id)
    hub.require_write(request.token, repo_id.split("/")[0])
    if not NAME.fullmatch(name):
        raise HubError(400, f"Invalid repo name: {name}")
    if (kind, repo_id) in hub.repositories:
        raise HubError(409, f"You already created this {kind} repo: {repo_id}", url=url)
    if kind == "space" and asked.get("sdk") not in ("static", "gradio", "docker", "streamlit"):
        raise HubError(400, "A Space needs an sdk.")
    private = asked.get("visibility") == "private" or bool(asked.get("private"))
    user = request.token.user
    hub.create_repository(kind, repo_id, user, private=private, sdk=asked.get("sdk"))
    return Response.json({"url": url, "name": repo_id, "id": repo_id})


@HUB.route("DELETE", "/api/repos/delete")
def delete(hub: Hub, request: Request) -> Response:
    asked = request.json()
    if request.token is None:
        raise HubError(401, "Invalid username or password.")
    repo_id = f"{asked.get('organization') or request.token.user}/{asked['name']}"
    kind = asked.get("type") or "model"
    hub.delete_repository(hub.repository(kind, repo_id, request.token, "write"))
    return Response.json({})


@HUB.route("POST", "/api/repos/move")
def move(hub: Hub, request: Request) -> Response:
    asked = request.json()
    kind = asked.get("type") or "model"
    repository = hub.repository(kind, asked["fromRepo"], request.token, "write")
    hub.require_write(request.token, asked["toRepo"].split("/")[0])
    if (kind, asked["toRepo"]) in hub.repositories:
        raise HubError(409, f"{asked['toRepo']} exists already")
    hub.move_repository(repository, asked["toRepo"])
    return Response.json({})


@HUB.route("PUT", f"{API}/settings")
def settings(hub: Hub, request: Request, kind: str, repo_id: str) -> Response:
    repository = hub.repository(kind, repo_id, request.token, "write")
    asked = request.json()
    if "visibility" in asked or "private" in asked:
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        repository.private = private
    if "gated" in asked:
        repository.gated = asked["gated"]
    repository.save()
    return Response.json({"private": repository.private, "gated": repository.gated})


@HUB.route("POST", f"{API}/branch/{REVISION}")
def create_branch(hub: Hub, request: Request, kind: str, repo_id: str, branch: str) -> Response:
    repository = hub.repository(kind, repo_id, request.token, "write")
    if branch in repository.branches:
        raise HubError(409, f"Reference already exists: {branch}")
    start = request.json().get("startingPoint") or "main"
    repository.branches[branch] = repository.resolve(start).id
    repository.save()
    return Response.json({})


@HUB.route("POST", f"{API}/tag/{REVISION}")
def create_tag(hub: Hub, request: Request, kind: str, repo_id: str, revision: str) -> Response:
    repository = hub.repository(kind, repo_id, request.token, "write")
    tag = request.json()["tag"]
    if tag in repository.tags:
        raise HubError(409, f"Tag reference exists already: {tag}")
    repository.tags[tag] = repository.resolve(revision).id
    repository.save()
    return Response.json({})


@HUB.route("DELETE", rf"{API}/(branch|tag)/{REVISION}")
def delete_ref(
    hub: Hub, request: Request, kind: str, repo_id: str, what: str, name: str
) -> Response:
    repository = hub.repository(kind, repo_id, request.token, "write")
    refs = repository.branches if what == "branch" else repository.tags
    if name not in refs:
        raise HubError(404, f"Reference not found: {name}", "RevisionNotFound")
    del refs[name]
    repository.save()
    return Response.json({})


@HUB.route("GET", r"/api/(?:model|dataset|space)s/[^/]+")
@HUB.route("GET", r"/(?:(?:dataset|space)s/)?[^/]+/resolve/.+")
def without_namespace(hub: Hub, request: Request) -> Response:
    """The Hub has such repositories from its early days; here there are none."""
    raise repository_not_found(request.token is not None)
