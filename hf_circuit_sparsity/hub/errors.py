"""Why the Hub did not do what was asked: one sentence per cause, with what to do about it."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Literal

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .repository import web_address

Kind = Literal["model", "dataset", "space"]
_SIGN_IN = "sign in with `hf auth login` or set HF_TOKEN"


class HubAccessError(OSError):
    """The Hub could not be reached or refused; the message says why and what to do."""


@contextmanager
def hub_errors(
    repo_id: str,
    kind: Kind = "model",
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    writing: bool = False,
) -> Iterator[None]:
    """Within the block, what the Hub's clients raise becomes a [`HubAccessError`].

    Args:
        repo_id: the repository that the block is about.
        kind: what it is expected to be.
        revision: the one asked for.
        token: as the clients take it.
        writing: whether the block creates or changes the repository.

    Raises:
        HubAccessError: the repository is missing, of another kind, gated, or has no such revision
            or file; nobody is signed in; there is no right to write; or the Hub is not reached.
    """
    try:
        yield
    except HubAccessError:
        raise
    except Exception as error:
        causes = _chain(error)
        sentence = _Refusal(repo_id, kind, revision, token, writing).sentence(causes)
        if sentence is None:
            raise
        raise HubAccessError(sentence) from error


def _chain(error: BaseException) -> list[BaseException]:
    """The error and what it was raised from: libraries wrap what the Hub's client raised."""
    causes: list[BaseException] = []
    todo: list[BaseException | None] = [error]
    while todo:
        current = todo.pop(0)
        if current is not None and current not in causes:
            causes.append(current)
            todo += [current.__cause__, current.__context__]
    return causes


class _Refusal:
    """Finds the sentence; may ask the Hub again for what to recommend."""

    def __init__(
        self,
        repo_id: str,
        kind: Kind,
        revision: str | None,
        token: str | bool | None,
        writing: bool,
    ) -> None:
        self.repo_id, self.kind, self.revision = repo_id, kind, revision
        self.writing = writing
        self.api = HfApi(token=token)
        known = token if isinstance(token, str) else token is not False and get_token()
        self.signed_in = bool(known)

    def sentence(self, causes: list[BaseException]) -> str | None:
        """What the first of the errors that says something says."""
        return next(filter(None, map(self._one, causes)), None)

    def _one(self, error: BaseException) -> str | None:
        what = f"the {self.kind} repository {self.repo_id!r}"
        match error:
            case HFValidationError():
                return f"{self.repo_id!r} was passed, but a repository is named like user/name."
            case GatedRepoError():
                return self._gated()
            case RepositoryNotFoundError():
                return self._missing()
            case RevisionNotFoundError():
                return self._no_revision()
            case LocalTokenNotFoundError():
                return f"Nobody is signed in, but {what} needs it; {_SIGN_IN}."
            case LocalEntryNotFoundError() | OfflineModeIsEnabled() if constants.HF_HUB_OFFLINE:
                at = f" at revision {self.revision!r}" if self.revision else ""
                return (
                    f"HF_HUB_OFFLINE is set and {what}{at} is not in the cache (or not all that is "
                    "needed of it), nor is there a folder of that name; unset it and load once "
                    "while connected."
                )
            case EntryNotFoundError():
                return None  # which file is missing is for the caller to explain
            case HfHubHTTPError() if error.response is not None:
                return self._refused(error.response.status_code)
        if _is_connection_error(error):
            return (
                f"The Hub at {self.api.endpoint} could not be reached; check the connection, or "
                "set HF_HUB_OFFLINE=1 to use what is in the cache."
            )
        return None

    def _gated(self) -> str:
        address = web_address(self.api.endpoint, self.repo_id, self.kind)
        then = "" if self.signed_in else f", then {_SIGN_IN}"
        return (
            f"Access to {self.repo_id!r} is granted by its owner only; ask for it at "
            f"{address}{then}."
        )

    def _missing(self) -> str:
        for other in ("model", "dataset", "space"):
            with suppress(Exception):
                if other != self.kind and self.api.repo_exists(self.repo_id, repo_type=other):
                    return (
                        f"{self.repo_id!r} is a {other} repository, but a {self.kind} repository "
                        "was expected; check its name."
                    )
        if self.writing and not self.signed_in:
            return f"Nobody is signed in, so {self.repo_id!r} cannot be written; {_SIGN_IN}."
        # Who reads may have meant a folder.
        name = f"{self.kind} repository {self.repo_id!r}"
        where = "" if self.writing else ", nor a folder of that name"
        if self.signed_in:
            return f"There is no {name} that {self._who()[0]} may read{where}; check its name."
        return f"There is no public {name}{where}; check its name, and if it is private {_SIGN_IN}."

    def _no_revision(self) -> str:
        choice = ""
        with suppress(Exception):
            refs = self.api.list_repo_refs(self.repo_id, repo_type=self.kind)
            names = [ref.name for ref in [*refs.branches, *refs.tags]]
            choice = f" ({', '.join(names[:8])}{', …' if len(names) > 8 else ''})"
        return (
            f"{self.repo_id!r} has no revision {self.revision!r}; pass one of its branches or "
            f"tags{choice} or a commit hash."
        )

    def _refused(self, status: int) -> str | None:
        if status == 401 and not self.signed_in:
            return f"Nobody is signed in, so {self.repo_id!r} cannot be written; {_SIGN_IN}."
        if status == 401:
            return f"The Hub does not know the access token that was sent; {_SIGN_IN} anew."
        if status == 403:
            name, role = self._who()
            if role == "read":
                return (
                    f"The access token of {name} only reads, so {self.repo_id!r} cannot be "
                    "written; make a token with the right to write."
                )
            return (
                f"{name} has no right to write to {self.repo_id!r}; choose a name that begins "
                "with the user's own or with that of one of their organizations."
            )
        if status >= 500:
            return f"The Hub at {self.api.endpoint} failed (status {status}); try again later."
        return None

    def _who(self) -> tuple[str, str]:
        """The name behind the token and what the token allows."""
        with suppress(Exception):
            me = self.api.whoami()
            return f"{me['name']!r}", me["auth"]["accessToken"]["role"]
        return "The signed-in user", ""


def _is_connection_error(error: BaseException) -> bool:
    # Of httpx or of its successor, whichever the installed client uses.
    transport = any(t.__name__ == "TransportError" for t in type(error).__mro__)
    return transport or isinstance(error, (ConnectionError, TimeoutError))
