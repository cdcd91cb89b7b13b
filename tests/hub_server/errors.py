"""How the Hub says no."""

from typing import Any


class HubError(Exception):
    """An HTTP error as the Hub words it.

    Args:
        status: HTTP status.
        message: goes into the body and into `X-Error-Message`.
        code: goes into `X-Error-Code`; the clients tell errors apart by it.
        headers: further headers.
        body: further fields of the JSON body.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        headers: dict[str, str] | None = None,
        **body: Any,
    ):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code
        self.headers = dict(headers or {})
        self.body = {"error": message, **body}


def repository_not_found(signed_in: bool) -> HubError:
    """Private and missing repositories look the same from outside."""
    if signed_in:
        return HubError(404, "Repository not found", "RepoNotFound")
    return HubError(401, "Invalid username or password.", "RepoNotFound")
