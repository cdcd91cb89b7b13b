"""The card of a dataset of tasks."""

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import DatasetDict
from huggingface_hub import DatasetCard, DatasetCardData

from ..hub_cards.card import all_tags, render, repo_title
from ..hub_cards.markdown import visible
from .definitions.base import DEFINITIONS

# In the card's metadata: name of a task to what it is about.
DESCRIPTIONS = "task_descriptions"
_SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"))


def task_dataset_card(
    tasks: Mapping[str, DatasetDict],
    descriptions: Mapping[str, str] | None = None,
    *,
    repo_id: str,
    tokenizer: str | None = None,
    seed: int | None = None,
    others: Sequence[str] = (),
    existing: DatasetCard | None = None,
    license: str = "apache-2.0",
    tags: Sequence[str] = (),
    mark: bool = False,
) -> DatasetCard:
    """The card of what `build_task_datasets` made, or of tasks of one's own.

    Args:
        tasks: name to its splits; each is a configuration of the dataset.
        descriptions: what tasks of one's own are about, by name.
        repo_id: where it is published, `user/name`; the example loads it from there.
        tokenizer: Hub id or name of the tokenizer of the columns of token ids.
        seed: that the rows of built-in tasks were made with.
        others: further tasks in the dataset, which the card only names.
        existing: the card that `DatasetDict.push_to_hub` has left there; its `configs` and
            `dataset_info`, which the viewer needs, are kept.
        license: as the Hub names it.
        tags: beside the usual ones.
        mark: whether the next push may write the card anew.

    Raises:
        ValueError: there is no task.
    """
    if not tasks:
        raise ValueError(f"There is no task to write a card for {repo_id!r} about; pass one.")
    rows = sum(len(split) for splits in tasks.values() for split in splits.values())
    before = existing.data.to_dict() if existing is not None else {}
    fields: dict[str, Any] = {n: before[n] for n in ("configs", "dataset_info") if n in before}
    if descriptions:
        fields[DESCRIPTIONS] = {visible(n): visible(text) for n, text in descriptions.items()}
    definitions = [DEFINITIONS[name] for name in tasks if name in DEFINITIONS]
    python = len(definitions) == len(tasks) and all(d.language == "python" for d in definitions)
    about = ["code", "python"] if python else []
    data = DatasetCardData(
        license=license, language=["en"], task_categories=["text-generation"],
        size_categories=next((name for most, name in _SIZES if rows < most), "1M<n<10M"),
        pretty_name=repo_title(repo_id), tags=all_tags([*about, "counterfactual", *tags]),
        **fields,
    )  # fmt: skip
    first = [name for name in tasks if name not in DEFINITIONS]
    first += [name for name in tasks if name == "single_double_quote"]
    shown = [*first, *tasks][0]
    lines = [
        {
            "name": name,
            **{split: len(splits.get(split, ())) for split in ("train", "test")},
            "description": DEFINITIONS[name].description if name in DEFINITIONS else "",
            "own_description": (descriptions or {}).get(name, ""),
        }
        for name, splits in tasks.items()
    ]
    return render(
        "task_dataset.md", data, repo_id, mark=mark, shown=shown, tasks=lines, rows=rows,
        tokenizer=tokenizer, seed=seed, others=others, python=python,
        built_in=len(definitions) == len(tasks),
    )  # fmt: skip
