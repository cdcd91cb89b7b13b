"""Documents of any dataset: from the Hub or from files, in memory or as a stream."""

import os
from collections.abc import Iterator
from glob import escape
from pathlib import Path
from typing import Literal

from datasets import (
    Dataset,
    DatasetDict,
    IterableDataset,
    IterableDatasetDict,
    load_dataset,
    load_dataset_builder,
)  # fmt: skip
from datasets.exceptions import DatasetGenerationError


def load_documents(
    dataset: str | os.PathLike[str],
    *,
    config: str | None = None,
    split: str = "train",
    validation_split: str | None = None,
    validation_documents: int = 1000,
    streaming: bool = False,
    sample_by: Literal["line", "paragraph", "document"] = "paragraph",
) -> DatasetDict | IterableDatasetDict:
    """Read a dataset by `load_dataset` into the splits `train` and `validation`.

    Without `validation_split` the first documents of `split` are held out: `validation_documents`
    of a stream; of a dataset in memory at most one in twenty. The same call gives the same splits,
    and no row is in both.

    Args:
        dataset: `user/name` on the Hub, a folder, or a file (Parquet, JSON lines, CSV, text and
            what else `load_dataset` reads).
        config: configuration of a dataset that has several.
        split: to train on; in memory also a part, such as `"train[:10%]"`.
        validation_split: to evaluate on.
        validation_documents: held out where there is no `validation_split`.
        streaming: whether to read while training, and keep nothing in memory or on disk.
        sample_by: what a document of a text file is; paragraphs end with an empty line.

    Raises:
        OSError: there is no such dataset, folder or file.
        ValueError: no such configuration or split, a file that cannot be read, or the two splits
            are one.
    """
    if validation_documents < 1:
        raise ValueError(f"validation_documents is {validation_documents}, but must be at least 1.")
    if validation_split == split:
        raise ValueError(
            f"validation_split is {split!r}, as is the split to train on; pass another, or none to "
            "hold out the first documents."
        )
    path = Path(dataset).expanduser().absolute()  # load_dataset(".") knows no name for that folder
    name, options = (str(path) if path.exists() else str(dataset)), {"name": config}
    if path.is_file():
        name, options["data_files"] = str(path.parent), escape(path.name)
    try:
        if hasattr(load_dataset_builder(name, **options).config, "sample_by"):  # text files
            options["sample_by"] = sample_by
        rows = load_dataset(name, **options, split=split, streaming=streaming)
        if validation_split is not None:
            held_out = load_dataset(name, **options, split=validation_split, streaming=streaming)
        elif streaming:
            held_out, rows = rows.take(validation_documents), rows.skip(validation_documents)
        else:
            n = min(validation_documents, max(1, len(rows) // 20), len(rows))
            held_out, rows = rows.select(range(n)), rows.select(range(n, len(rows)))
        if next(iter(rows), None) is None:
            raise ValueError(
                f"{dataset} has no documents in {split!r} beyond the {validation_documents:,} that "
                "are held out at most: pass a smaller validation_documents, or a validation_split."
            )
    except DatasetGenerationError as error:
        raise ValueError(f"{dataset} cannot be read: {error.__cause__ or error}") from error
    splits = {"train": rows, "validation": held_out}
    return IterableDatasetDict(splits) if streaming else DatasetDict(splits)


def documents_of(
    dataset: Dataset | IterableDataset, column: str = "text", name: str = "dataset"
) -> Iterator[str]:
    """The texts in a column, one by one.

    Args:
        dataset: also one that is streamed, with or without known columns.
        column: of the texts.
        name: what the dataset is called in errors.

    Raises:
        ValueError: there is no such column, or a row has no text in it.
    """
    if column in (dataset.column_names or ()):
        dataset = dataset.select_columns(column)  # the others may be pictures to decode
    row = 0
    for batch in dataset.with_format(None).iter(batch_size=64):
        if column not in batch:
            raise ValueError(
                f"The {name} has the columns {sorted(batch)}, but not {column!r}, which holds the "
                "documents; pass its name, or rename it."
            )
        for text in batch[column]:
            if not isinstance(text, str):
                raise ValueError(
                    f"Row {row} of the {name} has {text!r:.80} in {column!r}, expected a string; "
                    "leave such rows out."
                )
            yield text
            row += 1
