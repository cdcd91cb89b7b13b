"""What excites a circuit's nodes: histograms of activations, and the examples at either end."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn

from ...tasks.encoding import pad_left
from ..ablation import recorded_sites
from ..task_scores import trimmed

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
    ids, mask = pad_left(sequences)
    lengths = mask.sum(1)
    seen = {site: torch.zeros(*ids.shape, len(indices)) for site, indices in nodes.items()}
    # Sequences of like length together: little is computed for padding.
    batches = lengths.argsort(stable=True).split(batch_size)
    # Entered after `within`, so that the hooks see what it left of the activations.
    with within(), recorded_sites(model, nodes) as recorded:
        for rows in wrap(batches):
            batch = trimmed({"input_ids": ids[rows], "attention_mask": mask[rows]})
            input_ids, padding = (part.to(device) for part in batch.values())
            padding = None if padding.all() else padding
            model(input_ids, attention_mask=padding, use_cache=False, logits_to_keep=1)
            for site, indices in nodes.items():
                activations = recorded[site][..., list(indices)].float().cpu()
                seen[site][rows, -activations.shape[1] :] = activations
    values = {site: activations[mask.bool()] for site, activations in seen.items()}
    starts = [0, *lengths.cumsum(0).tolist()]
    return Activations(list(sequences), values, starts)


def histogram(values: torch.Tensor, low: float, high: float) -> dict[str, Any]:
    """Counts of the nonzero `values` in `BINS` equal bins from `low` to `high`.

    Zeros are apart: most activations are cut to zero, and would dwarf all others.

    Returns:
        `counts`, and `zero`, the share of values that are exactly zero.
    """
    nonzero = values[values != 0]
    counts = torch.histc(nonzero, BINS, low, high) if high > low else torch.zeros(BINS)
    return {"counts": counts.long().tolist(), "zero": 1 - len(nonzero) / max(1, len(values))}


QUANTILES = (0.001, 0.01, 0.1, 0.5, 0.9, 0.99)
"""Of a node's activations, at which an example is shown."""


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
    recorded: Activations, site: str, column: int, mean: float, count: int, sign: int
) -> list[Example]:
    """The sequences in which a node is highest (`sign` 1) or lowest (-1).

    One example per sequence, most extreme first; only activations above (below) the node's mean,
    at which it stands when it is ablated, and never the zeros that AbsTopK makes.

    Args:
        recorded: activations of one distribution.
        site: the node's.
        column: the node's, among those recorded there.
        mean: the node's.
        count: at most so many.
        sign: 1 or -1.
    """
    values = recorded.values[site][:, column]
    examples = []
    taken: set[int] = set()
    seen: set[tuple[int, ...]] = set()
    starts = torch.tensor(recorded.starts)
    for token in (sign * values).argsort(descending=True, stable=True).tolist():
        if len(examples) == count or sign * (values[token] - mean) <= 0:
            break
        if values[token] == 0:
            continue
        sequence = int(torch.searchsorted(starts, token, right=True)) - 1
        if sequence in taken:
            continue
        taken.add(sequence)
        example = _around(recorded, values, token)
        stop = example.start + len(example.values)
        stretch = tuple(recorded.input_ids[sequence][example.start : stop])
        if stretch in seen:  # text repeats itself, licences above all
            continue
        seen.add(stretch)
        examples.append(example)
    return examples


def quantile_examples(recorded: Activations, site: str, column: int) -> list[Example]:
    """A token at each of the `QUANTILES` of a node's activations, zeros included."""
    values = recorded.values[site][:, column]
    order = values.argsort(stable=True)
    places = [round(share * (len(values) - 1)) for share in QUANTILES]
    return [_around(recorded, values, int(order[place])) for place in places]


def _around(recorded: Activations, values: torch.Tensor, token: int) -> Example:
    """The stretch around a token, which is counted over all sequences."""
    starts = torch.tensor(recorded.starts)
    sequence = int(torch.searchsorted(starts, token, right=True)) - 1
    first, end = recorded.starts[sequence], recorded.starts[sequence + 1]
    at = token - first
    start, stop = max(0, at - BEFORE), min(end - first, at + AFTER + 1)
    return Example(sequence, start, at, values[first + start : first + stop].tolist())
