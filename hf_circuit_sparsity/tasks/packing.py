"""Pack documents into blocks of equal length for language-model training."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import (
    Dataset,
    DatasetDict,
    Features,
    IterableDataset,
    IterableDatasetDict,
    List,
    Value,
)  # fmt: skip
from transformers import PreTrainedTokenizerBase

from .documents import documents_of

# Enough documents to keep the tokenizer's threads busy, few enough to hold in memory at once.
_DOCUMENTS_PER_BATCH = 64


def pack_dataset(
    dataset: Dataset | DatasetDict | IterableDataset | IterableDatasetDict,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    *,
    text_column: str = "text",
) -> Dataset | DatasetDict | IterableDataset | IterableDatasetDict:
    """Tokenize documents and cut them into blocks of `block_size` tokens.

    The documents follow each other in the order of the rows, each ended by the end-of-text token.
    The stream is cut every `block_size` tokens, so a block may start inside a document; what is
    left at the end and does not fill a block is dropped. A document that spells out a special token
    gets it as ordinary text, so that no file can fake a document's end.

    Returns:
        A dataset (or a dict of the same splits) with two columns, both int32 of `block_size`
        entries: `input_ids`, and `labels`, which is the same (models that follow the transformers
        convention shift labels themselves). `Trainer` takes it as it is. Of a dataset it lives in
        memory: nothing is cached on disk. Of a stream it is a stream, which reads documents as
        blocks are taken from it.

    Raises:
        ValueError: `block_size` below 2, a tokenizer without end-of-text token, a missing text
            column or a row without text, or documents too short to fill one block. What is wrong
            with the documents of a stream is only raised when they are read.
    """
    if block_size < 2:
        raise ValueError(f"block_size is {block_size}, but must be at least 2.")
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "The tokenizer has no eos_token, but documents are joined by it; set "
            "tokenizer.eos_token."
        )
    if isinstance(dataset, dict):
        packed = {
            split: _pack_split(rows, tokenizer, block_size, text_column, f"{split} split")
            for split, rows in dataset.items()
        }
        streams = isinstance(dataset, IterableDatasetDict)
        return IterableDatasetDict(packed) if streams else DatasetDict(packed)
    return _pack_split(dataset, tokenizer, block_size, text_column, "dataset")


def _pack_split(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    column: str,
    name: str,
) -> Dataset | IterableDataset:
    arguments = {
        "dataset": dataset, "tokenizer": tokenizer, "block_size": block_size, "column": column,
        "name": name,
    }  # fmt: skip
    if isinstance(dataset, IterableDataset):
        block = List(Value("int32"), length=block_size)
        features = Features({"input_ids": block, "labels": block})
        return IterableDataset.from_generator(_rows, features, gen_kwargs=arguments)
    blocks = np.concatenate(list(_blocks(**arguments)))
    column = pa.FixedSizeListArray.from_arrays(pa.array(blocks.ravel()), block_size)
    # Both columns are the same Arrow buffer, so labels cost no memory.
    return Dataset(pa.table({"input_ids": column, "labels": column}))


def _rows(**arguments: Any) -> Iterator[dict[str, list[int]]]:
    for blocks in _blocks(**arguments):
        for block in blocks:
            ids = block.tolist()
            yield {"input_ids": ids, "labels": ids}


def _blocks(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    column: str,
    name: str,
) -> Iterator[np.ndarray]:
    """Arrays of shape `(n, block_size)`, which follow each other."""
    left = np.empty(0, dtype=np.int32)
    n_blocks = 0
    documents = documents_of(dataset, column, name)
    while batch := list(islice(documents, _DOCUMENTS_PER_BATCH)):
        encoded = tokenizer(
            batch, add_special_tokens=False, split_special_tokens=True,
            return_attention_mask=False, return_token_type_ids=False, verbose=False,
        )["input_ids"]  # fmt: skip
        ended = [np.array([*ids, tokenizer.eos_token_id], dtype=np.int32) for ids in encoded]
        tokens = np.concatenate([left, *ended])
        n = len(tokens) // block_size
        n_blocks += n
        left = tokens[n * block_size :]
        if n:
            yield tokens[: n * block_size].reshape(n, block_size)
    if n_blocks == 0:
        raise ValueError(
            f"The {name} has {len(left)} tokens in all, fewer than one block of {block_size}; pass "
            "more text or a smaller block_size."
        )


def spread_sample(dataset: Dataset | IterableDataset, most: int) -> Dataset:
    """About `most` rows spread evenly over a dataset, since neighbouring blocks share a file.

    Of a stream it is the first `most` rows.
    """
    if isinstance(dataset, IterableDataset):
        return Dataset(pa.concat_tables(dataset.take(most).with_format("arrow").iter(1000)))
    return dataset.select(range(0, len(dataset), max(1, len(dataset) // most)))
