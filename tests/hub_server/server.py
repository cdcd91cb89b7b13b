"""The server itself: two ports of the loopback interface, a log of requests, a place to interfere.

The Hub and its file storage are two origins, as they are in reality: clients must not send their
access token to the second.
"""

import shutil
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from tests.hub_server.errors import HubError
from tests.hub_server.hub import Hub, Role, Token
from tests.hub_server.routes import HUB, STORAGE
from tests.hub_server.wire import Request, Response, Router


@dataclass(frozen=True)
class Logged:
    """A request that was answered.

    Attributes:
        received: bytes of its body.
        known: false if this server has no such path, so that its answer means nothing.
    """

    method: str
    path: str
    status: int
    received: int
    user: str | None
    known: bool


class HubServer:
    """A Hub on loopback.

    Args:
        folder: where its state lies; a server started on the same folder knows it again.

    Attributes:
        log: every answered request, oldest first.
        before: called with each request before it is answered, by the thread that answers it; may
            raise `ConnectionAbortedError` to hang up without an answer, or `HubError`.
    """

    def __init__(self, folder: Path):
        self.hub = Hub(Path(folder))
        self.log: list[Logged] = []
        self.before: Callable[[Request], None] | None = None
        self._lock = threading.RLock()
        self._servers = [self._listen(HUB), self._listen(STORAGE)]
        hub_port, storage_port = (server.server_address[1] for server in self._servers)
        self.url = f"http://127.0.0.1:{hub_port}"
        # Another name, not only another port: some clients compare nothing but names.
        self.storage_url = f"http://localhost:{storage_port}"
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()

    def __enter__(self) -> "HubServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    @contextmanager
    def emptied(self) -> Iterator["HubServer"]:
        """Within the block nothing is there, and no one knows afterwards what was."""
        with self._lock:
            before, self.log, self.before = self.hub, [], None
            self.hub = Hub(Path(tempfile.mkdtemp(dir=before.folder)))
        try:
            yield self
        finally:
            with self._lock:
                shutil.rmtree(self.hub.folder, ignore_errors=True)
                self.hub, self.before = before, None

    def add_user(self, name: str, role: Role = "write", organizations: tuple[str, ...] = ()) -> str:
        """Make a user known and return an access token of theirs."""
        secret = f"hf_{name}_{role}"
        self.hub.tokens[secret] = Token(name, role)
        self.hub.organizations[name] = list(organizations)
        return secret

    def uploaded(self) -> int:
        """Bytes of file content received so far: LFS objects, and commits with their files."""
        return sum(
            entry.received
            for entry in list(self.log)
            if entry.method == "PUT" or "/commit/" in entry.path
        )

    def unknown_paths(self) -> list[str]:
        """What clients asked for that this server does not know of."""
        return [f"{e.method} {e.path}" for e in list(self.log) if not e.known]

    def _listen(self, router: Router) -> ThreadingHTTPServer:
        server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self, router))
        server.daemon_threads = True
        return server

    def answer(self, router: Router, request: Request) -> Response:
        known = True
        try:
            if self.before is not None:
                self.before(request)
            with self._lock:
                if router is HUB:
                    secret = request.headers.get("authorization", "").removeprefix("Bearer ")
                    request.token = self.hub.token(secret or None)
                response = router.answer(self.hub, request)
            if response is None:
                known = False
                raise HubError(404, "This server has no such path.")
        except HubError as error:
            response = Response.of_error(error)
        except ConnectionError:
            raise
        except Exception:
            # A failure of the fixture must be seen, not taken for a failure of the client.
            traceback.print_exc()
            response = Response.json({"error": traceback.format_exc()}, 500)
        user = request.token.user if request.token else None
        self.log.append(
            Logged(request.method, request.path, response.status, len(request.body), user, known)
        )
        return response


def _handler(server: HubServer, router: Router) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True
        wbufsize = -1  # header and body leave together
        timeout = 60

        def do_GET(self) -> None:
            try:
                body = self._body()
                parts = urlsplit(self.path)
                request = Request(
                    self.command,
                    parts.path,
                    parse_qs(parts.query),
                    {name.lower(): value for name, value in self.headers.items()},
                    body,
                    server.url,
                    server.storage_url,
                )
                response = server.answer(router, request)
                self._send(response)
            except (ConnectionError, TimeoutError):
                self.close_connection = True

        do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = do_GET

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
                chunks = []
                while size := int(self.rfile.readline().split(b";")[0] or b"0", 16):
                    chunks.append(self._exactly(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(chunks)
            return self._exactly(int(self.headers.get("Content-Length") or 0))

        def _exactly(self, size: int) -> bytes:
            content = self.rfile.read(size)
            if len(content) < size:
                raise ConnectionAbortedError("The client hung up within the body.")
            return content

        def _send(self, response: Response) -> None:
            self.send_response(response.status)
            for name, value in response.headers.items():
                # Header values are Latin-1; error messages may quote names that are not.
                self.send_header(name, value.encode("ascii", "replace").decode())
            self.send_header("Content-Length", str(len(response.body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(response.body)
            self.wfile.flush()

        def log_message(self, *_: object) -> None:
            pass

    return Handler
