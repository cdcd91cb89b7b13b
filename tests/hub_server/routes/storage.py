"""Where LFS files lie. It knows signed addresses only, and no access tokens."""

from tests.hub_server.errors import HubError
from tests.hub_server.hub import Hub
from tests.hub_server.routes.paths import STORAGE
from tests.hub_server.wire import Request, Response, ranged

OID = r"/objects/([0-9a-f]{64})"


def check_signed(request: Request) -> None:
    if request.query.get("signature") != ["signed"]:
        raise HubError(403, "The address is not signed.")
    if "authorization" in request.headers:
        raise HubError(400, "A client sent its access token to the file storage.")


@STORAGE.route("GET", OID)
def download(hub: Hub, request: Request, oid: str) -> Response:
    check_signed(request)
    if not hub.blobs.has_lfs(oid):
        raise HubError(404, "No such object.")
    return ranged(request, hub.blobs.read_lfs(oid), {"ETag": f'"{oid}"'})


@STORAGE.route("PUT", OID)
def upload(hub: Hub, request: Request, oid: str) -> Response:
    check_signed(request)
    hub.blobs.put_lfs(oid, request.body)
    return Response(200, b"", {"ETag": f'"{oid}"'})


@STORAGE.route("PUT", rf"{OID}/(\d+)")
def upload_part(hub: Hub, request: Request, oid: str, number: str) -> Response:
    check_signed(request)
    folder = hub.folder / "parts"
    folder.mkdir(exist_ok=True)
    (folder / f"{oid}.{number}").write_bytes(request.body)
    return Response(200, b"", {"ETag": f'"{number}"'})
