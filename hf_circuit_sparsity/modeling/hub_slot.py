"""The slot into which the package around this folder puts what it knows about the Hub.

Models, trainers and circuits push themselves to the Hub, but what a card says is decided on top of
all of them, in `hub_cards/`, and what a refusal means in `hub/`. Where the slot is empty, as it is
for a model that runs on the code that came with it, card and errors are those of transformers.
"""

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

_write: Callable[..., str | None] | None = None
_explain: Callable[..., AbstractContextManager[None]] | None = None


def fill_hub_slot(
    write: Callable[..., str | None] | None,
    explain: Callable[..., AbstractContextManager[None]] | None,
) -> None:
    """Say what writes cards and what explains refusals; None for what comes with transformers.

    Args:
        write: called as [`card_of`].
        explain: called as [`explained`].
    """
    global _write, _explain
    _write, _explain = write, explain


def _ask_package() -> None:
    if _write is None:
        with suppress(ImportError):
            importlib.import_module("hf_circuit_sparsity.hub_cards")  # fills the slot


def explained(repo_id: str, **facts: Any) -> AbstractContextManager[None]:
    """Within it, what the Hub refuses is said in one sentence; see `hub/errors.py`."""
    _ask_package()
    return nullcontext() if _explain is None else _explain(repo_id, **facts)


def card_of(kind: str, artifact: Any, repo_id: str, **facts: Any) -> str | None:
    """The README for an artifact, or None if another one is to stay as it is.

    Args:
        kind: `"model"` or `"circuit"`.
        artifact: the model or the circuit.
        repo_id: where it is pushed to.
        facts: see `hub_cards/pushed_card.py`.
    """
    _ask_package()
    return None if _write is None else _write(kind, artifact, repo_id, **facts)
