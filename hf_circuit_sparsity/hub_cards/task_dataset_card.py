"""The card of a dataset of tasks."""

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import DatasetDict
from huggingface_hub import DatasetCard, DatasetCardData

from ..tasks.definitions.base import DEFINITIONS
from .markdown import code, python, table, text
from .metadata import all_tags, render, repo_title

_SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"))


def task_dataset_card(
    tasks: Mapping[str, DatasetDict],
    *,
    repo_id: str,
    tokenizer: str | None = None,
    seed: int | None = None,
    existing: DatasetCard | None = None,
    license: str = "apache-2.0",
    tags: Sequence[str] = (),
) -> DatasetCard:
    """The card of what `build_task_datasets` made.

    Args:
        tasks: name to its splits; each is a configuration of the dataset.
        repo_id: where it is published, `user/name`; the example loads it from there.
        tokenizer: Hub id or name of the tokenizer of the columns of token ids.
        seed: that the rows were made with.
        existing: the card that `DatasetDict.push_to_hub` has left there; its `configs` and
            `dataset_info`, which the viewer needs, are kept.
        license: as the Hub names it.
        tags: beside the usual ones.

    Raises:
        ValueError: there is no task.
    """
    if not tasks:
        raise ValueError(f"There is no task to write a card for {repo_id!r} about; pass one.")
    rows = sum(len(split) for splits in tasks.values() for split in splits.values())
    kept = existing.data.to_dict() if existing is not None else {}
    fields: dict[str, Any] = {n: kept[n] for n in ("configs", "dataset_info") if n in kept}
    data = DatasetCardData(
        license=license,
        language=["en"],
        task_categories=["text-generation"],
        size_categories=next((name for most, name in _SIZES if rows < most), "1M<n<10M"),
        pretty_name=repo_title(repo_id),
        tags=all_tags(["code", "python", "counterfactual"], tags),
        **fields,
    )
    first = "single_double_quote" if "single_double_quote" in tasks else next(iter(tasks))
    made_by = "By `build_task_datasets` of `hf-circuit-sparsity`"
    made_by += "" if seed is None else f" with seed {seed}"
    ids_of = f"The token ids are those of {code(tokenizer)}." if tokenizer else (
        "Which tokenizer the token ids are of is not stated."
    )  # fmt: skip
    return render(
        DatasetCard,
        "task_dataset.md",
        data,
        title=text(repo_title(repo_id)),
        summary=(
            f"{len(tasks)} binary next-token tasks on Python, {rows:,} rows: after each prompt one "
            "of two tokens is right, and a counterfactual prompt makes it the other. They are made "
            "for cutting circuits out of language models and for checking them."
        ),
        snippet=_snippet(repo_id, first),
        tasks=table(
            ("task", "train", "test", "what decides"),
            [_row(name, splits) for name, splits in tasks.items()],
        ),
        origin=f"{made_by}. {ids_of}",
    )


def _row(name: str, splits: DatasetDict) -> tuple[str, ...]:
    known = DEFINITIONS.get(name)
    return (
        code(name),
        f"{len(splits['train']):,}" if "train" in splits else "–",
        f"{len(splits['test']):,}" if "test" in splits else "–",
        _with_code(known.description) if known else "a task of one's own",
    )


def _with_code(description: str) -> str:
    """A description of ours, in which backticks enclose code."""
    parts = description.split("`")
    return "".join(code(part) if i % 2 else text(part) for i, part in enumerate(parts))


def _snippet(repo_id: str, task: str) -> str:
    return "\n".join(
        [
            "from datasets import load_dataset",
            "",
            f"task = load_dataset({python(repo_id)}, {python(task)})",
            'row = task["test"][0]',
            'print(repr(row["prompt"]), "→", repr(row["target"]))',
        ]
    )
