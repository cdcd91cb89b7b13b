"""A sample of the pretraining distribution, over which nodes' means are taken."""

import torch
from datasets import Dataset
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..tasks.binary_task import BinaryTask
from ..tasks.corpus import build_corpus
from ..tasks.packing import pack_dataset
from .ablation import ReferenceMeans, reference_means

ReferenceTokens = Dataset | torch.Tensor | None


def means_over(
    model: nn.Module,
    task: BinaryTask,
    reference: ReferenceTokens | ReferenceMeans,
    tokens: int,
    progress: bool = False,
) -> ReferenceMeans:
    """Means over a sample of the pretraining distribution; those that are passed are returned."""
    if isinstance(reference, ReferenceMeans):
        return reference
    return reference_means(
        model, reference_input_ids(model, task.tokenizer, reference, tokens, progress)
    )


def reference_input_ids(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    reference: ReferenceTokens,
    tokens: int,
    progress: bool = False,
) -> torch.Tensor:
    """Token ids `(n, length)` of about `tokens` tokens, n ≥ 1.

    Args:
        model: its context bounds the length where `reference` is `None`.
        tokenizer: used where `reference` is `None`.
        reference: rows of equal length; `None` takes the Python standard library, tokenized.
        tokens: how many, roughly.
        progress: say so, in one line, when the standard library is taken.
    """
    if isinstance(reference, torch.Tensor):
        if reference.dim() != 2 or not len(reference):
            raise ValueError(
                f"reference of shape {tuple(reference.shape)} was passed, expected token ids of "
                "shape (n, length) with n ≥ 1."
            )
        return reference[: max(1, tokens // reference.shape[1])]
    if reference is None:
        if progress:
            tqdm.write("No reference was passed: tokenizing the Python standard library.")
        block_size = min(256, model.config.max_position_embeddings)
        reference = pack_dataset(build_corpus()["train"], tokenizer, block_size)
    if "input_ids" not in reference.column_names or not len(reference):
        raise ValueError(
            f"reference has the columns {reference.column_names} and {len(reference)} rows, "
            "expected at least one row and the column input_ids."
        )
    length = len(reference[0]["input_ids"])
    count = min(len(reference), max(1, tokens // length))
    # Spread over the whole set: neighbouring blocks come from the same file.
    rows = torch.linspace(0, len(reference) - 1, count).long().tolist()
    return torch.tensor(reference.select(rows)["input_ids"][:])
