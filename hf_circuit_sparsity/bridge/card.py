"""The card of a bridge between a dense model and its sparse model."""

from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import ModelCard

from ..circuits.circuit_file import is_hub_id
from ..hub_cards.card import model_metadata, render, results_of
from ..hub_cards.markdown import is_number
from .losses import BY_LOCATION
from .modeling_bridge import BridgedCausalLM

# Name in the summary, what it is, unit.
_TERMS = (
    ("lm", "the sparse model's loss", "nats per token"),
    ("kl", "KL(dense ‖ sparse)", "nats per token"),
    ("nmse", "normalized error of the bridges", "share of variance missed, both ways added"),
    ("dense_to_sparse", "KL of runs from dense to sparse", "nats per token"),
    ("sparse_to_dense", "KL of runs from sparse to dense", "nats per token"),
)


def bridge_card(
    bridged: BridgedCausalLM,
    *,
    repo_id: str,
    summary: Mapping[str, Any] | None = None,
    base_model: str | None = None,
    datasets: Sequence[str] = (),
    license: str = "apache-2.0",
    tags: Sequence[str] = (),
    mark: bool = False,
) -> ModelCard:
    """The card of a bridge.

    Args:
        bridged: its configs go onto the card.
        repo_id: where it is published, `user/name`; the example loads it from there.
        summary: what training measured, the content of `bridge_summary.json`.
        base_model: Hub id of the dense model; what the bridge names if not given.
        datasets: Hub ids of what it was trained on.
        license: as the Hub names it.
        tags: beside the usual ones.
        mark: whether the next push may write the card anew.
    """
    summary, config = summary or {}, bridged.config
    named = config.base_model_name_or_path
    base_model = base_model or (named if is_hub_id(named) else None)
    results = results_of(summary, [(key, key, name) for key, name, _ in _TERMS])
    data = model_metadata(
        repo_id, results, tags=["bridge", "weight-sparse", *tags], datasets=datasets,
        license=license, base_model=base_model,
        base_model_relation="adapter" if base_model else None,
    )  # fmt: skip
    locations = range(bridged.n_locations)
    measured = any(is_number(summary.get(f"{n}_{i}")) for i in locations for n in BY_LOCATION)
    return render(
        "bridge.md", data, repo_id, mark=mark, base_model=base_model, config=config,
        sparse=bridged.sparse.config, n_locations=len(locations),
        locations=locations if measured else [], summary=summary, terms=_TERMS,
    )  # fmt: skip
