"""Requests, responses, and which function answers which path."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any
from urllib.parse import parse_qs, unquote

from tests.hub_server.errors import HubError
from tests.hub_server.hub import Hub, Token


@dataclass
class Request:
    """A request whose body has arrived.

    Attributes:
        path: as sent, percent-escapes and all.
        token: who asks; None without an Authorization header.
        hub_url: where the Hub answers.
        storage_url: where files lie, another origin, as on the real Hub.
    """

    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    body: bytes
    hub_url: str
    storage_url: str
    token: Token | None = None

    def json(self) -> Any:
        try:
            return json.loads(self.body)
        except ValueError as error:
            raise HubError(400, f"The body is not JSON: {error}") from error

    def parameters(self) -> dict[str, list[str]]:
        """A body that is a form, or JSON whose values may be lists."""
        if self.headers.get("content-type", "").startswith("application/json"):
            content = self.json().items()
            return {name: v if isinstance(v, list) else [str(v)] for name, v in content}
        return parse_qs(self.body.decode())

    def flag(self, name: str) -> bool:
        return self.query.get(name, ["false"])[-1].lower() in ("true", "1")


@dataclass
class Response:
    """An answer; `body` may be a range of a longer file."""

    status: int = HTTPStatus.OK
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def json(cls, content: Any, status: int = HTTPStatus.OK, **headers: str) -> "Response":
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        body = json.dumps(content).encode()
        return cls(status, body, {"Content-Type": "application/json; charset=utf-8", **headers})

    @classmethod
    def of_error(cls, error: HubError) -> "Response":
        response = cls.json(error.body, error.status)
        response.headers["X-Error-Message"] = error.message
        if error.code:
            response.headers["X-Error-Code"] = error.code
        response.headers.update(error.headers)
        return response


def ranged(request: Request, content: bytes, headers: dict[str, str]) -> Response:
    """The content, or the part of it that the request's Range header asks for."""
    headers = {"Accept-Ranges": "bytes", **headers}
    asked = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("range", ""))
    if asked is None or asked.groups() == ("", ""):
        return Response(200, content, headers)
    first, last = asked.groups()
    if first == "":
        start, end = max(len(content) - int(last), 0), len(content)
    else:
        start, end = int(first), min(int(last) + 1 if last else len(content), len(content))
    if start >= end:
        return Response(416, b"", {"Content-Range": f"bytes */{len(content)}"})
    headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(content)}"
    return Response(206, content[start:end], headers)


Handler = Callable[..., Response]


class Router:
    """Functions by method and pattern; the pattern's groups, unquoted, are their arguments."""

    def __init__(self) -> None:
        self._routes: list[tuple[str, re.Pattern, Handler]] = []

    def route(self, method: str, pattern: str) -> Callable[[Handler], Handler]:
        def register(handler: Handler) -> Handler:
            self._routes.append((method, re.compile(pattern), handler))
            return handler

        return register

    def handler(self, request: Request) -> tuple[Handler, list[str | None]] | None:
        method = "GET" if request.method == "HEAD" else request.method
        for wanted, pattern, handler in self._routes:
            match = pattern.fullmatch(request.path) if wanted == method else None
            if match:
                return handler, [None if g is None else unquote(g) for g in match.groups()]
        return None

    def answer(self, hub: Hub, request: Request) -> Response | None:
        """The response, or None if no pattern fits."""
        found = self.handler(request)
        if found is None:
            return None
        handler, arguments = found
        return handler(hub, request, *arguments)
