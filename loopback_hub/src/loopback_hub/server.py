"""The server itself: one port of the loopback interface, a log of requests, and a hook."""

import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from loopback_hub.hub import Hub, HubError, Role, Token
from loopback_hub.routes import Request, Response, answer, as_json


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
    known: bool


class HubServer:
    """A Hub on loopback.

    Attributes:
        log: every answered request, oldest first.
        before: called with each request before it is answered, by the thread that answers it; may
            raise `ConnectionAbortedError` to hang up without an answer, or `HubError`.
    """

    def __init__(self) -> None:
        self.hub = Hub()
        self.log: list[Logged] = []
        self.before: Callable[[Request], None] | None = None
        self._lock = threading.RLock()
        server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        server.daemon_threads = True
        self.url = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()

    @contextmanager
    def emptied(self) -> Iterator["HubServer"]:
        """Within the block nothing is there, and no one knows afterwards what was."""
        with self._lock:
            before, self.hub, self.log, self.before = self.hub, Hub(), [], None
        try:
            yield self
        finally:
            with self._lock:
                self.hub, self.before = before, None

    def add_user(self, name: str, role: Role = "write") -> str:
        """Make a user known and return an access token of theirs."""
        secret = f"hf_{name}_{role}"
        self.hub.tokens[secret] = Token(name, role)
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

    def answer(self, request: Request) -> Response:
        known = True
        try:
            if self.before is not None:
                self.before(request)
            with self._lock:
                secret = request.headers.get("authorization", "").removeprefix("Bearer ")
                if secret and secret not in self.hub.tokens:
                    raise HubError(401, "Invalid credentials in Authorization header")
                request.token = self.hub.tokens.get(secret)
                response = answer(self.hub, request)
            if response is None:
                known = False
                raise HubError(404, "This server has no such path.")
        except HubError as error:
            response = as_json(error.body, error.status, error.headers)
        except ConnectionError:
            raise
        except Exception:
            # A failure of the fixture must be seen, not taken for a failure of the client.
            traceback.print_exc()
            response = as_json({"error": traceback.format_exc()}, 500)
        self.log.append(
            Logged(request.method, request.path, response.status, len(request.body), known)
        )
        return response


def _handler(server: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True
        wbufsize = -1  # header and body leave together
        timeout = 60

        def do_GET(self) -> None:
            parts = urlsplit(self.path)
            headers = {name.lower(): value for name, value in self.headers.items()}
            try:
                request = Request(
                    self.command, parts.path, parse_qs(parts.query), headers, self._body(),
                    server.url,
                )  # fmt: skip
                self._send(server.answer(request))
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
