"""The card of a dataset of tasks."""

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import DatasetDict
from huggingface_hub import DatasetCard, DatasetCardData

from ..hub_cards.card import all_tags, render, repo_title
from .definitions.base import DEFINITIONS

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
    before = existing.data.to_dict() if existing is not None else {}
    fields: dict[str, Any] = {n: before[n] for n in ("configs", "dataset_info") if n in before}
    data = DatasetCardData(
        license=license, language=["en"], task_categories=["text-generation"],
        size_categories=next((name for most, name in _SIZES if rows < most), "1M<n<10M"),
        pretty_name=repo_title(repo_id), tags=all_tags(["code", "python", "counterfactual", *tags]),
        **fields,
    )  # fmt: skip
    shown = "single_double_quote" if "single_double_quote" in tasks else next(iter(tasks))
    lines = [
        {
            "name": name,
            **{split: len(splits.get(split, ())) for split in ("train", "test")},
            "description": DEFINITIONS[name].description if name in DEFINITIONS else "",
        }
        for name, splits in tasks.items()
    ]
    return render(
        "task_dataset.md", data, repo_id, shown=shown, tasks=lines, rows=rows,
        tokenizer=tokenizer, seed=seed,
    )  # fmt: skip
