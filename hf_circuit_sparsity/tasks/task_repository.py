"""Tasks of one's own in folders and in datasets on the Hub."""

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, get_dataset_config_names, load_dataset
from datasets.exceptions import DatasetGenerationError
from huggingface_hub import CommitInfo, DatasetCard, HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from ..hub_cards.card import MARK
from .card import DESCRIPTIONS, task_dataset_card
from .text import COLUMNS, FILE_NAME, Row, TaskText, check_columns, read_task_text, text_of_table

MAX_ROWS = 1_000_000


def table_of_dataset(dataset: Dataset | DatasetDict, name: str) -> dict[str, list[Row]]:
    """The rows of a dataset by split, each with its place; a single table is one split.

    Raises:
        ValueError: it lacks columns, has no row or far too many.
    """
    one = isinstance(dataset, Dataset)
    splits = {}
    for split, table in ({"": dataset} if one else dataset).items():
        if split not in ("", "train", "test") and len(dataset) > 1:
            continue
        where = f"Task {name!r}" + (f", the {split} split" if split else "")
        check_columns(f"{where}: the dataset", table.column_names)
        if not 0 < len(table) <= MAX_ROWS:
            raise ValueError(f"{where} has {len(table):,} rows, but must have 1 to {MAX_ROWS:,}.")
        columns = [c for c in (*COLUMNS, "template", "split") if c in table.column_names]
        rows = table.with_format(None).select_columns(columns)
        splits[split] = [
            (f"row {split}[{i}]" if split else f"row {i}", r) for i, r in enumerate(rows)
        ]
    return splits


def read_task(
    name_or_path: str | os.PathLike,
    config_name: str | None = None,
    name: str | None = None,
    *,
    seed: int = 0,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> TaskText:
    """The text of a task in a folder or on the Hub; arguments and errors as of
    [`BinaryTask.from_pretrained`], and the `seed` by which a single table is split."""
    source = os.fspath(name_or_path)
    if (Path(source) / FILE_NAME).is_file():
        text = read_task_text(source)
        return text if name is None else TaskText(name, text.description, text.train, text.test)
    options: dict[str, Any] = {"revision": revision, "token": token}
    if cache_dir is not None:
        options["cache_dir"] = os.fspath(cache_dir)
    configs = get_dataset_config_names(source, **options)
    if config_name is None and len(configs) == 1:
        config_name = configs[0]
    if config_name not in configs:
        but = "" if config_name is None else f", but not {config_name!r:.120}"
        raise ValueError(
            f"{source!r} holds the tasks {', '.join(map(repr, configs))[:600]}{but}; pass one of "
            f"them, as {source}:{configs[0]}."
        )
    try:
        dataset = load_dataset(source, config_name, **options)
    except (DatasetGenerationError, ValueError) as error:  # pyarrow's errors are ValueErrors
        raise ValueError(
            f"The files of {config_name!r} in {source!r} could not be read as a table "
            f"({error.__cause__ or error!r:.300})."
        ) from error
    if name is None:
        name = Path(source).name if config_name == "default" else config_name
    described = {} if Path(source).is_dir() else _descriptions(source, revision, token)
    text = described.get(config_name)
    return text_of_table(
        name, table_of_dataset(dataset, name), text if isinstance(text, str) else "", seed=seed
    )


def push_task(
    name: str,
    description: str,
    splits: DatasetDict,
    repo_id: str,
    *,
    built_in: bool,
    private: bool,
    revision: str | None,
    token: str | bool | None,
    **commit: Any,
) -> CommitInfo:
    """Upload a task as a configuration of a dataset; see [`BinaryTask.push_to_hub`]."""
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True).repo_id
    existing = _card(repo_id, revision, token)
    with tempfile.TemporaryDirectory() as folder:
        write_task_datasets(
            folder, {name: splits}, {} if built_in else {name: description}, repo_id=repo_id,
            existing=existing, mark=True,
        )  # fmt: skip
        return api.upload_folder(
            repo_id=repo_id, repo_type="dataset", folder_path=folder, revision=revision, **commit
        )


def write_task_datasets(
    folder: str | os.PathLike,
    tasks: Mapping[str, DatasetDict],
    descriptions: Mapping[str, str] | None = None,
    *,
    repo_id: str,
    tokenizer: str | None = None,
    seed: int | None = None,
    existing: DatasetCard | None = None,
    mark: bool = False,
) -> None:
    """Lay out tasks as `load_dataset` reads them: a configuration each, and the card.

    Args:
        folder: to write into.
        tasks: name to splits.
        descriptions: of those that are not built in.
        repo_id, tokenizer, seed: as for [`task_dataset_card`].
        existing: the card that is there; other tasks on it stay. One that a person wrote keeps its
            text.
        mark: whether the next push may write the card anew.
    """
    folder = Path(folder)
    configs = []
    for name, splits in tasks.items():
        (folder / name).mkdir(parents=True)
        files = []
        for split, rows in splits.items():
            path = f"{name}/{split}-00000-of-00001.parquet"
            rows.to_parquet(folder / path)
            files.append({"split": split, "path": path})
        configs.append({"config_name": name, "data_files": files})
    before = existing.data.to_dict() if existing is not None else {}
    others = _others(before.get("configs"), tasks)
    described = {**_mapping(before.get(DESCRIPTIONS)), **(descriptions or {})}
    if existing is not None and MARK not in existing.content:
        existing.data.configs = [*others, *configs]
        existing.data[DESCRIPTIONS] = described
        card = existing
    else:
        card = task_dataset_card(
            tasks, described, repo_id=repo_id, tokenizer=tokenizer, seed=seed,
            others=[config["config_name"] for config in others], mark=mark,
        )  # fmt: skip
        card.data.configs = [*others, *configs]
        infos = _others(before.get("dataset_info"), tasks)
        if infos:
            card.data["dataset_info"] = infos
    card.save(folder / "README.md")


def _others(entries: Any, tasks: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Entries of a card's metadata about configurations other than these tasks."""
    entries = entries if isinstance(entries, Sequence) else [entries]
    named = [e for e in entries if isinstance(e, Mapping) and isinstance(e.get("config_name"), str)]
    return [entry for entry in named if entry["config_name"] not in tasks]


def _card(repo_id: str, revision: str | None, token: str | bool | None) -> DatasetCard | None:
    try:
        path = hf_hub_download(
            repo_id, "README.md", repo_type="dataset", revision=revision, token=token
        )
    except EntryNotFoundError:
        return None
    return DatasetCard(Path(path).read_text(encoding="utf-8"))


def _descriptions(
    repo_id: str, revision: str | None, token: str | bool | None
) -> Mapping[str, Any]:
    card = _card(repo_id, revision, token)
    return {} if card is None else _mapping(card.data.to_dict().get(DESCRIPTIONS))


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
