"""What excites a circuit's nodes: histograms of activations, and the examples at either end."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn

from ..ablation import hooked_sites

BINS = 32
BEFORE, AFTER = 24, 8
"""Tokens shown before and after the one that an example is chosen for."""


class Activations(NamedTuple):
    """Activations of some nodes on some sequences."""

    input_ids: list[list[int]]
    """One list per sequence."""
    values: dict[str, torch.Tensor]
    """Site → float32 `(tokens of all sequences, nodes recorded there)`."""
    starts: list[int]
    """Where each sequence's tokens begin in the values, and, last, where all end."""


@torch.no_grad()
def record_activations(
    model: nn.Module,
    nodes: Mapping[str, Sequence[int]],
    sequences: Sequence[list[int]],
    *,
    within: Callable[[], AbstractContextManager[Any]] = nullcontext,
    batch_size: int = 32,
    wrap: Callable[[Iterable], Iterable] = iter,
) -> Activations:
    """Run the model over token sequences and keep what the nodes did.

    Args:
        model: has `node_sites()`.
        nodes: site → indices of the nodes to record.
        sequences: token ids, of any lengths.
        within: made and entered around the run, e.g. to run on a circuit alone.
        batch_size: sequences per forward pass.
        wrap: put around the batches, e.g. a progress bar.
    """
    device = next(model.parameters()).device
    lengths = [len(sequence) for sequence in sequences]
    starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    values = {site: torch.zeros(starts[-1], len(ids)) for site, ids in nodes.items()}
    rows: list[int] = []
    # Sequences of like length together: little is computed for padding.
    order = sorted(range(len(sequences)), key=lengths.__getitem__)
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]

    def keeper(site: str) -> Callable:
        def hook(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            kept = output[..., list(nodes[site])].float().cpu()
            for row, sequence in enumerate(rows):
                length = lengths[sequence]
                start = starts[sequence]
                values[site][start : start + length] = kept[row, kept.shape[1] - length :]

        return hook

    # Entered after `within`, so that the hooks see what it left of the activations.
    with within(), hooked_sites(model, {site: keeper(site) for site in nodes}):
        for batch in wrap(batches):
            rows[:] = batch
            longest = max(lengths[i] for i in batch)
            ids = torch.zeros(len(batch), longest, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, i in enumerate(batch):
                ids[row, longest - lengths[i] :] = torch.tensor(sequences[i])
                mask[row, longest - lengths[i] :] = 1
            model(
                ids.to(device),
                attention_mask=None if mask.all() else mask.to(device),
                use_cache=False,
                logits_to_keep=1,
            )
    return Activations(list(sequences), values, starts)


def histogram(values: torch.Tensor, low: float, high: float) -> dict[str, Any]:
    """Counts of the nonzero `values` in `BINS` equal bins from `low` to `high`.

    Zeros are apart: most activations are cut to zero, and would dwarf all others.

    Returns:
        `counts`, and `zero`, the share of values that are exactly zero.
    """
    nonzero = values[values != 0]
    counts = torch.histc(nonzero, BINS, low, high) if high > low else torch.zeros(BINS)
    return {
        "counts": counts.long().tolist(),
        "zero": 1 - len(nonzero) / max(1, len(values)),
    }


class Example(NamedTuple):
    """A stretch of a sequence around the token at which a node is most, or least, active."""

    sequence: int
    start: int
    """First token shown."""
    at: int
    """The token it was chosen for."""
    values: list[float]
    """The node's activation at every token shown."""


def extreme_examples(
    recorded: Activations, site: str, place: int, mean: float, count: int, sign: int
) -> list[Example]:
    """The sequences in which a node is highest (`sign` 1) or lowest (-1).

    One example per sequence, most extreme first; only activations above (below) the node's mean,
    at which it stands when it is ablated, and never the zeros that AbsTopK makes.

    Args:
        recorded: activations of one distribution.
        site: the node's.
        place: its place among the nodes recorded there.
        mean: the node's.
        count: at most so many.
        sign: 1 or -1.
    """
    column = recorded.values[site][:, place]
    examples = []
    taken: set[int] = set()
    seen: set[tuple[int, ...]] = set()
    starts = torch.tensor(recorded.starts)
    for token in (sign * column).argsort(descending=True, stable=True).tolist():
        if len(examples) == count or sign * (column[token] - mean) <= 0:
            break
        if column[token] == 0:
            continue
        sequence = int(torch.searchsorted(starts, token, right=True)) - 1
        if sequence in taken:
            continue
        taken.add(sequence)
        first, end = recorded.starts[sequence], recorded.starts[sequence + 1]
        at = token - first
        start, stop = max(0, at - BEFORE), min(end - first, at + AFTER + 1)
        stretch = tuple(recorded.input_ids[sequence][start:stop])
        if stretch in seen:  # text repeats itself, licences above all
            continue
        seen.add(stretch)
        shown = column[first + start : first + stop].tolist()
        examples.append(Example(sequence, start, at, shown))
    return examples
