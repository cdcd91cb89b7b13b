"""Collections: named lists of repositories."""

import re

from tests.hub_server.errors import HubError
from tests.hub_server.hub import Hub, object_id
from tests.hub_server.routes.paths import HUB
from tests.hub_server.wire import Request, Response

SLUG = r"/api/collections/([^/]+/[^/]+)"


@HUB.route("POST", "/api/collections")
def create(hub: Hub, request: Request) -> Response:
    asked = request.json()
    namespace, title = asked["namespace"], asked["title"]
    hub.require_write(request.token, namespace)
    name = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
    slug = f"{namespace}/{name}-{object_id(namespace, title)}"
    if slug in hub.collections:
        raise HubError(409, "A collection with this title exists already.", slug=slug)
    collection = {
        "slug": slug,
        "title": title,
        "owner": {"name": namespace, "type": "user"},
        "description": asked.get("description"),
        "private": bool(asked.get("private")),
        "position": 0,
        "theme": "green",
        "upvotes": 0,
        "items": [],
    }
    hub.save_collection(collection)
    return Response.json(collection)


@HUB.route("GET", "/api/collections")
def search(hub: Hub, request: Request) -> Response:
    owners = request.query.get("owner", [])
    found = [
        {name: value for name, value in collection.items() if name != "position"}
        for collection in hub.collections.values()
        if visible(hub, request, collection)
        and (not owners or collection["owner"]["name"] in owners)
    ]
    return Response.json(found)


@HUB.route("GET", SLUG)
def get(hub: Hub, request: Request, slug: str) -> Response:
    collection = hub.collections.get(slug)
    if collection is None or not visible(hub, request, collection):
        raise HubError(404, "Collection not found")
    return Response.json(collection)


@HUB.route("DELETE", SLUG)
def delete(hub: Hub, request: Request, slug: str) -> Response:
    hub.require_write(request.token, slug.split("/")[0])
    if slug not in hub.collections:
        raise HubError(404, "Collection not found")
    hub.delete_collection(slug)
    return Response.json({})


@HUB.route("POST", f"{SLUG}/items?")
def add_item(hub: Hub, request: Request, slug: str) -> Response:
    hub.require_write(request.token, slug.split("/")[0])
    collection = hub.collections.get(slug)
    if collection is None:
        raise HubError(404, "Collection not found")
    asked = request.json()
    kind, item = asked["item"]["type"], asked["item"]["id"]
    hub.repository(kind, item, request.token)
    if any((i["type"], i["id"]) == (kind, item) for i in collection["items"]):
        raise HubError(409, f"{item} is already in the collection.")
    note = asked.get("note")
    collection["items"].append(
        {
            "_id": object_id(slug, kind, item),
            "id": item,
            "type": kind,
            "position": len(collection["items"]),
            **({"note": {"text": note}} if note else {}),
        }
    )
    hub.save_collection(collection)
    return Response.json(collection)


def visible(hub: Hub, request: Request, collection: dict) -> bool:
    names = hub.names_of(request.token.user) if request.token else []
    return not collection["private"] or collection["owner"]["name"] in names
