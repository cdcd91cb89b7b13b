"""Cards for what pushes itself: a model, a trainer's model, a circuit."""

from collections.abc import Mapping
from typing import Any

from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError
from torch import nn

from ..circuits.circuit import Circuit
from ..circuits.hub import CircuitOnHub, list_circuits
from .circuit_card import circuit_card
from .model_card import model_card

# What marks a card as written by us, and so ours to write anew.
MARK = "<!-- written by hf-circuit-sparsity; without this line it is left as it is -->"


def pushed_card(kind: str, artifact: Any, repo_id: str, **facts: Any) -> str | None:
    """The README for what is pushed, or None if the one that is there is to stay.

    Args:
        kind: `"model"` or `"circuit"`.
        artifact: the model or the circuit.
        repo_id: where it is pushed to.
        facts: keyword arguments of [`pushed_model_card`] or [`pushed_circuit_card`].
    """
    write = {"model": pushed_model_card, "circuit": pushed_circuit_card}[kind]
    return write(artifact, repo_id, **facts)


def pushed_model_card(
    model: nn.Module,
    repo_id: str,
    *,
    existing: str | None = None,
    summary: Mapping[str, Any] | None = None,
    **fields: Any,
) -> str | None:
    """As [`model_card`], unless it is no CircuitGPT or the card there was written by a person.

    Args:
        existing: the card that would be replaced.
    """
    if getattr(model.config, "model_type", None) != "circuitgpt":
        return None
    if existing is not None and MARK not in existing:
        return None
    return _marked(model_card(model, repo_id=repo_id, summary=summary, **fields))


def pushed_circuit_card(
    circuit: Circuit,
    repo_id: str,
    *,
    subfolder: str = "",
    picture: bool = False,
    token: str | bool | None = None,
    revision: str | None = None,
) -> str | None:
    """The card of a repository after one more circuit was pushed to it.

    None where the repository has a card that is not ours: that of a model, or a person's own.

    Args:
        subfolder: where the circuit goes; "" for the root.
        picture: whether `circuit.png` is beside it.
        token, revision: of the repository.
    """
    try:
        existing = ModelCard.load(repo_id, token=token)
    except (EntryNotFoundError, RepositoryNotFoundError):
        existing = None
    if existing is not None and MARK not in existing.text:
        return None
    if existing is not None and "circuit" not in (existing.data.tags or ()):
        return None  # ours, but of a model
    others = [
        place
        for place in list_circuits(repo_id, revision=revision, token=token)
        if place.repo_id == repo_id and place.subfolder != subfolder
    ]
    pictures = [subfolder] if picture else []
    pictures += [place.subfolder for place in others if _has_picture(place, token)]
    circuits = {subfolder: circuit}
    circuits |= {place.subfolder: place.load(token=token) for place in others}
    ordered = dict(sorted(circuits.items()))
    return _marked(circuit_card(ordered, repo_id=repo_id, pictures=pictures))


def _has_picture(place: CircuitOnHub, token: str | bool | None) -> bool:
    path = f"{place.subfolder}/circuit.png" if place.subfolder else "circuit.png"
    return HfApi(token=token).file_exists(place.repo_id, path, revision=place.revision)


def _marked(card: ModelCard) -> str:
    card.text = f"{card.text.rstrip()}\n\n{MARK}\n"
    return str(card)
