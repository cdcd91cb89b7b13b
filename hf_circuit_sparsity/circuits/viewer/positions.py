"""What nodes do at single tokens of a prompt: each is ablated there, and nowhere else."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ablation import hooked_sites
from ..circuit import Circuit
from ..edges import embedding_edges, unembedding_edges
from .layout import Key

# Tokens of a forward pass, roughly.
_AT_ONCE = 8192


@torch.no_grad()
def position_effects(
    circuit: Circuit,
    model: nn.Module,
    nodes: Sequence[Key],
    ids: Sequence[int],
    answers: tuple[int, int],
    last: int,
    wrap: Callable[[Iterable], Iterable] = iter,
) -> tuple[float, Tensor]:
    """How the circuit's answer to one prompt changes when a node is at its mean at one token only.

    The answer is a difference of logits, calibrated: that of the right token minus that of the
    other, after the whole prompt. Every node and token is an ablation of its own, not an estimate;
    so what two of them do in each other's stead is in neither.

    Args:
        circuit: of `model`; it runs alone.
        model: the model, in eval mode.
        nodes: those of the circuit to measure.
        ids: the prompt.
        answers: the right token and the other.
        last: how many tokens of the prompt, its last, are measured.
        wrap: put around the forward passes, e.g. a progress bar.

    Returns:
        The circuit's difference, and by how much it falls, float32 `(nodes, tokens measured)`: what
        is positive speaks for the right answer.
    """
    device = next(model.parameters()).device
    first = max(0, len(ids) - last)
    places = [(node, token) for node in nodes for token in range(first, len(ids))]
    prompt = torch.tensor([list(ids)], device=device)

    def differences(count: int) -> Tensor:
        output = model(prompt.expand(count, -1), use_cache=False, logits_to_keep=1)
        logits = output.logits[:, -1].float().cpu()
        return logits[:, answers[0]] - logits[:, answers[1]]

    fit = max(1, _AT_ONCE // len(ids))
    parts = []
    with circuit.apply(model, collapsed=True):
        whole = differences(1)
        for start in wrap(range(0, len(places), fit)):
            part = places[start : start + fit]
            with hooked_sites(model, _hooks(circuit, part)):
                parts.append(whole - differences(len(part)))
    effects = torch.cat(parts) if parts else torch.empty(0)
    return whole.item(), effects.view(len(nodes), len(ids) - first)


def _hooks(circuit: Circuit, places: Sequence[tuple[Key, int]]) -> dict[str, Callable]:
    """Site → a hook that puts one node of each row at its mean, at one token."""
    by_site: dict[str, list[tuple[int, int, int]]] = {}
    for row, ((site, index), token) in enumerate(places):
        by_site.setdefault(site, []).append((row, token, index))

    def hook_of(site: str) -> Callable:
        rows, tokens, indices = torch.tensor(by_site[site]).T
        means = circuit.means[site][indices]

        def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            at = tuple(part.to(output.device) for part in (rows, tokens, indices))
            return output.index_put(at, means.to(output))

        return hook

    return {site: hook_of(site) for site in by_site}


def token_weights(
    circuit: Circuit, model: nn.Module, prompts: Iterable[int], answers: Iterable[int]
) -> dict[str, list[tuple[Any, ...]]]:
    """What the tokens of some prompts write to the circuit, and what it says of their answers.

    Returns:
        `embed`: token id, channel that the circuit reads, weight; without tokens that were pruned.
        `unembed`: channel that it writes to, token id, weight.
    """
    tokens = set(prompts) if circuit.tokens is None else set(prompts) & set(circuit.tokens)
    return {
        "embed": embedding_edges(model, circuit.nodes, sorted(tokens)),
        "unembed": unembedding_edges(model, circuit.nodes, sorted(set(answers))),
    }
