"""What to do when the Hub refuses or cannot be reached."""

from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

_SIGN_IN = "sign in with `hf auth login` or set HF_TOKEN"
_ADVICE: tuple[tuple[type[Exception], str], ...] = (
    (GatedRepoError, f"Ask for access on the repository's page, and {_SIGN_IN}."),
    (RepositoryNotFoundError, f"Check the name; if the repository is private, {_SIGN_IN}."),
    (RevisionNotFoundError, "Pass one of the repository's branches or tags or a commit hash."),
    (LocalTokenNotFoundError, f"To write, {_SIGN_IN}."),
    (
        OfflineModeIsEnabled,
        "HF_HUB_OFFLINE is set: unset it and load once while connected.",
    ),
    (
        LocalEntryNotFoundError,
        "Check the connection; HF_HUB_OFFLINE=1 uses what is in the cache and nothing else.",
    ),
    (ConnectionError, "Check the connection, or set HF_HUB_OFFLINE=1 to use the cache."),
)
_BY_STATUS = {
    401: f"The access token is missing or not valid; {_SIGN_IN}.",
    403: "Use a token with the right to write, and a name that begins with your own or with "
    "that of one of your organizations.",
}


def hub_advice(error: BaseException) -> str | None:
    """One sentence on what to do about an error of the Hub's clients; None for any other error.

    Looks at what the error was raised from too: libraries wrap what the Hub's client raised.
    """
    causes: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in causes:
        causes.append(current)
        current = current.__cause__ or current.__context__
    for cause in causes:
        for kind, advice in _ADVICE:
            if isinstance(cause, kind):
                return advice
        if isinstance(cause, HfHubHTTPError) and cause.response is not None:
            return _BY_STATUS.get(cause.response.status_code, "Try again later.")
        if any(t.__name__ == "TransportError" for t in type(cause).__mro__):  # of httpx
            return "Check the connection, or set HF_HUB_OFFLINE=1 to use the cache."
    return None
