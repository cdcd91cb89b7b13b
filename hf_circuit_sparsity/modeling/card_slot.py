"""The slot into which the package around this folder puts what writes cards.

Models, trainers and circuits push themselves to the Hub, but what a card says is decided on top of
all of them, in `hub_cards/`. Where the slot is empty, as it is for a model that runs on the code
that came with it, the card is what transformers writes.
"""

from collections.abc import Callable
from typing import Any

_write: Callable[..., str | None] | None = None


def fill_card_slot(write: Callable[..., str | None] | None) -> None:
    """Say what writes cards.

    Args:
        write: called as [`card_of`]; None empties the slot.
    """
    global _write
    _write = write


def card_of(kind: str, artifact: Any, repo_id: str, **facts: Any) -> str | None:
    """The README for an artifact, or None if another one is to stay as it is.

    Args:
        kind: `"model"` or `"circuit"`.
        artifact: the model or the circuit.
        repo_id: where it is pushed to.
        facts: see `hub_cards/pushed_card.py`.
    """
    return None if _write is None else _write(kind, artifact, repo_id, **facts)
