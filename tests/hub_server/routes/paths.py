"""Pieces of the Hub's paths, and the two routers: the Hub itself and its file storage."""

from tests.hub_server.wire import Router

HUB, STORAGE = Router(), Router()

ID = r"([^/]+/[^/]+)"
API = rf"/api/(model|dataset|space)s/{ID}"
REVISION = r"([^/]+)"
# Models have no prefix in web addresses, the others have.
WEB = rf"/(?:(dataset|space)s/)?{ID}"


def kind_of(prefix: str | None) -> str:
    return prefix or "model"


def web_path(kind: str, repo_id: str) -> str:
    return f"/{repo_id}" if kind == "model" else f"/{kind}s/{repo_id}"
