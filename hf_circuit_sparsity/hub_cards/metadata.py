"""What all cards share: their metadata, and the rendering of a template."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CardData, DatasetCard, EvalResult, ModelCard
from jinja2 import Environment, StrictUndefined

from .markdown import visible

TEMPLATES = Path(__file__).parent / "templates"
LIBRARY = "hf-circuit-sparsity"
TAG = "circuit-sparsity"


def render(
    kind: type[ModelCard] | type[DatasetCard], template: str, card_data: CardData, **parts: Any
) -> Any:
    """The card of a template.

    Args:
        kind: class of the card.
        template: name of a file in `templates/`.
        card_data: its metadata.
        parts: what the template names; Markdown already, as it is put in as it is.
    """
    # Not `kind.from_template`: that takes an empty part and a forgotten one alike.
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    source = environment.from_string((TEMPLATES / template).read_text(encoding="utf-8"))
    return kind(source.render(card_data=card_data.to_yaml().rstrip(), **parts) + "\n")


def all_tags(own: Sequence[str], more: Sequence[str]) -> list[str]:
    """The tags of a kind of artifact and the person's own, each once, on one line each."""
    return list(dict.fromkeys([TAG, "interpretability", *own, *(visible(tag) for tag in more)]))


def repo_title(repo_id: str) -> str:
    """The name of a repository without its owner's."""
    return visible(repo_id.rsplit("/", 1)[-1])


def result(
    metric: str, name: str, value: float, dataset: str, dataset_name: str, config: str | None = None
) -> EvalResult:
    """A number for the model-index.

    Args:
        metric: its identifier, as `loss` or `accuracy`.
        name: what people call it.
        value: as measured.
        dataset: Hub id of the dataset, or a name for what has none.
        dataset_name: what people call it.
        config: the dataset's configuration; the task.
    """
    return EvalResult(
        task_type="text-generation",
        task_name="Text Generation",
        dataset_type=visible(dataset),
        dataset_name=visible(dataset_name),
        dataset_config=None if config is None else visible(config),
        dataset_split="test" if config is not None else "validation",
        metric_type=metric,
        metric_name=name,
        metric_value=float(value),
        verified=None,
    )


def measured(numbers: Mapping[str, Any] | None, name: str) -> float | None:
    """A number that was measured and stored, or None."""
    value = (numbers or {}).get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return value if abs(value) < float("inf") else None
