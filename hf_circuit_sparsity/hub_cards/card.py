"""A card: metadata and a rendered template."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CardData, DatasetCard, EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from .markdown import (
    Markdown,
    block,
    code,
    codes,
    is_number,
    number,
    path,
    python,
    text,
    visible,
    with_code,
)

LIBRARY = "hf-circuit-sparsity"
# What stands for the dataset where the tasks are not published as one.
TASKS_NAME = "circuit-sparsity-tasks"
# What marks a card as ours to write anew when the artifact is pushed again.
MARK = "<!-- written by hf-circuit-sparsity; without this line it is left as it is -->"

_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    finalize=lambda value: value if isinstance(value, Markdown) else text(value),
)
_TEMPLATES.filters |= {f.__name__: f for f in (block, code, codes, number, path, python, with_code)}


def render(
    template: str, data: CardData, repo_id: str, *, mark: bool = False, **facts: Any
) -> ModelCard | DatasetCard:
    """The card of a template.

    Args:
        template: name of a file in `templates/`.
        data: the card's metadata.
        repo_id: where the card goes; its title is the repository's name.
        mark: whether the card may be written anew by the next push.
        facts: plain values that the template names. It shows each of them as text.
    """
    body = _TEMPLATES.get_template(template).render(
        title=repo_title(repo_id), repo_id=repo_id, **facts
    )
    kind = ModelCard if isinstance(data, ModelCardData) else DatasetCard
    card = f"---\n{data.to_yaml().rstrip()}\n---\n\n{body.rstrip()}\n"
    return kind(f"{card}\n{MARK}\n" if mark else card)


def model_metadata(
    repo_id: str,
    results: Sequence[EvalResult],
    *,
    tags: Iterable[str],
    datasets: Sequence[str] = (),
    library: str = LIBRARY,
    **fields: Any,
) -> ModelCardData:
    """Metadata of a model, a circuit or a bridge.

    Args:
        repo_id: where the card goes.
        results: numbers for the model-index.
        tags: beside those of all cards.
        datasets: Hub ids.
        library: that loads the artifact.
        fields: further ones, as `license` and `base_model`.
    """
    return ModelCardData(
        library_name=library, pipeline_tag="text-generation", tags=all_tags(tags),
        datasets=list(datasets) or None, metrics=sorted({r.metric_type for r in results}) or None,
        model_name=repo_title(repo_id) if results else None, eval_results=list(results) or None,
        **fields,
    )  # fmt: skip


def all_tags(tags: Iterable[str]) -> list[str]:
    """The tags of every card and `tags`, each once, on one line each."""
    return list(dict.fromkeys(["circuit-sparsity", "interpretability", *map(visible, tags)]))


def repo_title(repo_id: str) -> str:
    """The name of a repository without its owner's."""
    return visible(repo_id.rsplit("/", 1)[-1])


def results_of(
    numbers: Mapping[str, Any],
    metrics: Iterable[tuple[str, str, str]],
    *,
    task: str | None = None,
    dataset: str = "python",
) -> list[EvalResult]:
    """Numbers for the model-index; what was not measured is left out.

    Args:
        numbers: what was measured, by name.
        metrics: name in `numbers`, the metric's identifier as `loss`, and what people call it.
        task: on whose held-out prompts they were measured; on held-out Python if not given.
        dataset: Hub id of the dataset, or a name for what has none.
    """
    return [
        EvalResult(
            task_type="text-generation",
            task_name="Text Generation",
            dataset_type=visible(dataset),
            dataset_name=visible(f"{task} (held-out prompts)") if task else "Held-out Python",
            dataset_config=visible(task) if task else None,
            dataset_split="test" if task else "validation",
            metric_type=metric,
            metric_name=name,
            metric_value=float(numbers[key]),
            verified=None,
        )
        for key, metric, name in metrics
        if is_number(numbers.get(key))
    ]


def circuit_results(circuit: Mapping[str, Any], dataset: str) -> list[EvalResult]:
    """Numbers of a circuit, given as the content of its `circuit.json`, for the model-index."""
    return results_of(
        circuit["metrics"],
        (
            ("circuit_loss", "task_loss", "Task loss of the circuit alone (nats)"),
            ("circuit_accuracy", "accuracy", "Accuracy of the circuit alone"),
            ("edges", "circuit_size", "Edges of the circuit"),
        ),
        task=circuit["task"],
        dataset=dataset,
    )
