"""Who am I, and may I."""

import yaml

from tests.hub_server.errors import HubError
from tests.hub_server.hub import Hub
from tests.hub_server.routes.paths import API, HUB
from tests.hub_server.wire import Request, Response


@HUB.route("GET", "/api/whoami-v2")
def whoami(hub: Hub, request: Request) -> Response:
    if request.token is None:
        raise HubError(401, "Invalid username or password.")
    user = request.token.user
    return Response.json(
        {
            "type": "user",
            "id": user,
            "name": user,
            "fullname": user.title(),
            "orgs": [{"type": "org", "name": n} for n in hub.organizations.get(user, [])],
            "auth": {"type": "access_token", "accessToken": {"role": request.token.role}},
        }
    )


@HUB.route("GET", rf"{API}/auth-check(/write)?")
def auth_check(hub: Hub, request: Request, kind: str, repo_id: str, write: str | None) -> Response:
    hub.repository(kind, repo_id, request.token, "write" if write else "content")
    return Response.json({})


@HUB.route("POST", "/api/validate-yaml")
def validate_yaml(hub: Hub, request: Request) -> Response:
    """What the Hub checks of a README's header before a commit."""
    errors, warnings = [], []
    try:
        card = card_data(request.json()["content"])
    except yaml.YAMLError as error:
        return Response.json({"errors": [{"message": f"YAML: {error}"}], "warnings": []}, 400)
    if card is None:
        warnings.append({"message": "empty or missing yaml metadata in repo card"})
    for name in ("tags", "datasets", "metrics"):
        value = (card or {}).get(name)
        if value is not None and not isinstance(value, (str, list)):
            errors.append({"message": f'"{name}" must be a string or an array'})
    for name in ("license", "library_name", "pipeline_tag"):
        value = (card or {}).get(name)
        if value is not None and not isinstance(value, str):
            errors.append({"message": f'"{name}" must be a string'})
    return Response.json({"errors": errors, "warnings": warnings}, 400 if errors else 200)


def card_data(readme: str) -> dict | None:
    """The YAML between the dashes at the top of a README."""
    parts = readme.lstrip("\ufeff").split("---\n", 2)
    if len(parts) < 3 or parts[0].strip():
        return None
    content = yaml.safe_load(parts[1])
    return content if isinstance(content, dict) else None
