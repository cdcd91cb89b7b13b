"""Start a model's bigram table at counted bigrams, so that training need not learn them."""

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn


@torch.no_grad()
def initialize_bigram_table_(
    model: nn.Module, blocks: Dataset | Tensor, smoothing: float = 300.0
) -> None:
    """Set a CircuitGPT's bigram table to the logarithm of smoothed bigram counts, in place.

    Where the rest of the model adds nothing, its loss is that of the counts from the first step on.
    A table that starts at zero takes thousands of steps to learn the same.

    Args:
        model: with a `bigram_table` of shape `(V, V)`, learnable or not; its values are replaced.
        blocks: training tokens, integers below V: a tensor of shape `(n, context)`, or a dataset
            with such a column `input_ids`.
        smoothing: pseudo-counts added to each token's successors, distributed as single tokens.

    Raises:
        ValueError: the model has no bigram table, or a token is not in its vocabulary.
        TypeError: `blocks` is something else.
    """
    table = getattr(model, "bigram_table", None)
    if not isinstance(table, Tensor):
        raise ValueError(
            f"{type(model).__name__} has no bigram_table: configure it with "
            "enable_bigram_table=True, or train without this start."
        )
    vocabulary = len(table)
    if isinstance(blocks, Dataset):
        blocks = blocks.with_format("numpy")["input_ids"][:]
    tokens = np.asarray(blocks)
    if tokens.ndim != 2:
        raise TypeError(
            f"blocks is a {type(blocks).__name__}, expected a tensor of shape (n, context) or a "
            "datasets.Dataset; of a stream take some rows."
        )
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < vocabulary:
        raise ValueError(
            f"blocks hold tokens from {tokens.min()} to {tokens.max()}, expected 0 to "
            f"{vocabulary - 1}: pack the text with the model's own tokenizer."
        )
    table.copy_(torch.from_numpy(_log_probabilities(tokens, vocabulary, smoothing)))


def _log_probabilities(tokens: np.ndarray, vocabulary: int, smoothing: float) -> np.ndarray:
    """`(V, V)`: of the next token given one; rows have mean 0, as softmax ignores a shift."""
    pairs = tokens[:, :-1].astype(np.int64) * vocabulary + tokens[:, 1:]
    counts = np.bincount(pairs.ravel(), minlength=vocabulary**2).reshape(vocabulary, vocabulary)
    single = np.bincount(tokens.ravel(), minlength=vocabulary) + 1.0
    single /= single.sum()
    totals = counts.sum(1, keepdims=True)
    logits = np.log((counts + smoothing * single) / (totals + smoothing))
    return logits - logits.mean(1, keepdims=True)
