"""Prompts and their counterfactuals, pair by pair: what is predicted, and where heads look."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from ...decoders.decoder import decoder_of
from ...tasks.binary_task import BinaryTask
from ..ablation import recorded_sites
from ..attention import attention_patterns
from ..circuit import Circuit
from ..pruning.find import task_example

PAIR_TOKENS = 48
"""Tokens of a prompt, its last, whose attention and activations are shown."""
PREDICTED = 5
"""Next tokens named after a prompt."""
_SIDES = ("", "counterfactual_")

Pair = list[dict[str, Any]]
"""A prompt and its counterfactual: `ids`, and the answers `target` and `other`."""


def task_pairs(circuit: Circuit, task: BinaryTask, rows: Sequence[int], count: int) -> list[Pair]:
    """The circuit's own example, the task's first if it has none, and held-out ones.

    Args:
        circuit: has the example.
        task: has the others.
        rows: of the held-out prompts, in the order in which they are taken.
        count: at most so many pairs, each once.
    """
    example = circuit.example
    named = [example.get(f"{side}token_ids") for side in _SIDES]
    if not all(named) or not all(f"{side}target_id" in example for side in _SIDES):
        example = task_example(task)
    pairs = [
        [
            {
                "ids": list(example[f"{side}token_ids"]),
                "target": example[f"{side}target_id"],
                "other": example[f"{other}target_id"],
            }
            for side, other in (_SIDES, _SIDES[::-1])
        ]
    ]
    for row in map(task.test.__getitem__, rows):
        answers = [row[f"{side}target_id"] for side in _SIDES]
        pair = [
            {"ids": list(row[f"{side}input_ids"]), "target": target, "other": other}
            for side, target, other in zip(_SIDES, answers, answers[::-1], strict=True)
        ]
        if len(pairs) < count and pair not in pairs:
            pairs.append(pair)
    return pairs


@torch.no_grad()
def predictions(circuit: Circuit, model: nn.Module, ids: Sequence[int]) -> dict[str, Any]:
    """The likeliest next tokens of the whole model and of the circuit, with their probabilities.

    Returns:
        `model` and `circuit` (whose logits are calibrated): all probabilities, float32 `(V,)`.
    """
    batch = torch.tensor([list(ids)], device=next(model.parameters()).device)
    found = {}
    for run, within in (("model", nullcontext()), ("circuit", circuit.apply(model))):
        with within:
            logits = model(batch, use_cache=False, logits_to_keep=1).logits[0, -1]
        found[run] = logits.float().softmax(-1).cpu()
    return found


def strongest(probabilities: torch.Tensor) -> list[tuple[int, float]]:
    """The `PREDICTED` likeliest tokens with their probabilities."""
    values, tokens = probabilities.topk(min(PREDICTED, len(probabilities)))
    return list(zip(tokens.tolist(), values.tolist(), strict=True))


def head_patterns(
    circuit: Circuit,
    model: nn.Module,
    heads: Iterable[tuple[int, int]],
    prompts: Sequence[Sequence[int]],
    wrap: Callable[[Iterable], Iterable] = iter,
) -> list[dict[str, Any]]:
    """Where some heads look on some prompts, in the circuit and in the whole model.

    Returns:
        One entry per head: `layer`, `head`, and `circuit` and `model`, a list per prompt of the
        attention of its last `PAIR_TOKENS` tokens, per mille, row after row, and only what
        causality allows.
    """
    entries = {(layer, h): {"circuit": [], "model": []} for layer, h in heads}
    layers = sorted({layer for layer, _ in entries})
    for ids in wrap(prompts if entries else ()):
        for run, within in (("circuit", lambda: circuit.apply(model)), ("model", nullcontext)):
            weights = attention_patterns(model, ids, layers, within)
            for (layer, head), entry in entries.items():
                square = weights[layer][head][-PAIR_TOKENS:, -PAIR_TOKENS:]
                lower = [(1000 * row[: i + 1]).round().int() for i, row in enumerate(square)]
                entry[run].append(torch.cat(lower).tolist())
    return [{"layer": layer, "head": h, **entry} for (layer, h), entry in entries.items()]


@torch.no_grad()
def channel_scale(model: nn.Module, ids: Sequence[int], layer: int) -> float | None:
    """What query times key of one channel is multiplied by to be its part of the attention score.

    Found out by computing a layer's attention from its queries and keys: where rotary positions or
    norms lie between, a score is no sum over channels, and there is no such number.
    """
    decoder = decoder_of(model)
    scale = decoder.head_dim**-0.5
    sites = [f"h.{layer}.attn.{kind}" for kind in "qk"]
    with recorded_sites(model, sites) as recorded:
        pattern = attention_patterns(model, ids, [layer])[layer]
    q, k = (
        recorded[site][0].float().cpu().unflatten(-1, (-1, decoder.head_dim)).transpose(0, 1)
        for site in sites
    )
    if len(q) != len(k):
        return None
    scores = scale * q @ k.transpose(-1, -2)
    later = torch.ones_like(scores[0], dtype=torch.bool).triu(1)
    computed = scores.masked_fill(later, -torch.inf).softmax(-1)
    # A sink takes the same share of every score.
    seen = pattern / pattern.sum(-1, keepdim=True).clamp_min(1e-9)
    # Compared with how far it is from even: a head that looks everywhere alike proves nothing.
    even = torch.ones_like(computed).tril() / torch.arange(1, len(ids) + 1)[:, None]
    return scale if (computed - seen).norm() <= 0.05 * (seen - even).norm() else None
