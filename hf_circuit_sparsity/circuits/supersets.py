"""What stays on beside a circuit: nothing, some of the rest at random, or what an adversary picks.

A circuit alone may answer because everything else is silent. If it is the mechanism, it answers
whatever else runs beside it: with any part of the rest switched on, one choice for a whole batch,
so that noise cannot be tuned to single prompts.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from .gating import GatedModel, Gates, Prepared, frozen_weights
from .task_scores import TaskTensors, binary_loss


def random_superset(
    widths: Mapping[str, int], generator: torch.Generator, share: float | None = None
) -> dict[str, Tensor]:
    """Site → bool `(width,)`: each node with the same probability, which is itself drawn.

    Args:
        widths: site → number of nodes.
        generator: of the draw.
        share: the probability, if it is not to be drawn from [0, 1].
    """
    if share is None:
        share = float(torch.rand((), generator=generator))
    return {s: torch.rand(width, generator=generator) < share for s, width in widths.items()}


def beside(gates: Gates, outside: Gates) -> Gates:
    """The gates with what is outside switched on as well; gradients reach both."""
    if next(iter(gates.values())).dtype is torch.bool:
        return {site: gate | (outside[site] > 0.5) for site, gate in gates.items()}
    return {site: gate + (1 - gate) * outside[site] for site, gate in gates.items()}


def ascend(
    gated: GatedModel,
    rows: TaskTensors,
    gates: Gates,
    outside: Gates,
    loss: Callable[[Tensor], Tensor],
    steps: int,
    rate: float,
    prepared: Prepared | None = None,
    most: int | None = None,
) -> Gates:
    """Gates of the rest that make a circuit fail: gradient ascent on its loss.

    Every gate moves by the sign of its gradient. Where only so many may be on, half of them are
    left out at every step until they are as few, those with the least gradient.

    Args:
        gated: the model.
        rows: of the task.
        gates: the circuit's, 0 or 1, `(k, width)` per site.
        outside: where the ascent starts, in [0, 1], `(k, width)` per site.
        loss: of the logits `(rows, 2)`; `(k,)` or a number.
        steps: of the ascent, each a forward and a backward pass.
        rate: how far each gate moves per step.
        prepared: of these rows, where it is known already.
        most: how many nodes may be on in the end; from a random half it takes about ten steps.

    Returns:
        Site → `(k, width)`, in [0, 1]; 0 or 1 with `most`.
    """
    gates = {site: gate.detach().float() for site, gate in gates.items()}
    prepared = prepared or gated.prepare(rows)
    with frozen_weights(gated.model), torch.enable_grad():
        for _ in range(steps):
            outside = {s: gate.detach().float().requires_grad_() for s, gate in outside.items()}
            total = loss(gated.run(rows, beside(gates, outside), prepared)).sum()
            gradients = torch.autograd.grad(total, list(outside.values()), allow_unused=True)
            steep = {
                site: torch.zeros_like(gate) if gradient is None else gradient
                for (site, gate), gradient in zip(outside.items(), gradients, strict=True)
            }
            if most is None:
                outside = {s: (g + rate * steep[s].sign()).clamp(0, 1) for s, g in outside.items()}
            else:
                outside = _fewer(gates, outside, steep, rate, most)
    return {site: gate.detach() for site, gate in outside.items()}


@torch.no_grad()
def _fewer(gates: Gates, outside: Gates, steep: Gates, rate: float, most: int) -> Gates:
    """Half as many on, but not fewer than `most`: those with the steepest ascent, and by so much
    rather those that are on already."""
    on = torch.cat([gate * (1 - gates[site]) for site, gate in outside.items()], 1)
    slope = torch.cat(list(steep.values()), 1)
    open_rest = 1 - torch.cat(list(gates.values()), 1)
    scores = rate * on + slope / slope.abs().amax(1, keepdim=True).clamp_min(1e-12)
    count = max(most, int((on > 0).sum(1).max()) // 2)
    values, ids = scores.where(open_rest > 0, -torch.inf).topk(min(count, on.shape[1]), dim=1)
    chosen = torch.zeros_like(on).scatter_(1, ids, (values > 0).to(on))
    parts = chosen.split([gate.shape[1] for gate in outside.values()], 1)
    return dict(zip(outside, parts, strict=True))


def adversarial_superset(
    gated: GatedModel,
    rows: TaskTensors,
    keep: Mapping[str, Tensor],
    calibrated: Callable[[Tensor, TaskTensors], Tensor],
    generator: torch.Generator,
    steps: int,
    rate: float = 0.25,
    restarts: int = 1,
    most: int | None = None,
    begin: Sequence[Mapping[str, Tensor]] = (),
) -> dict[str, Tensor]:
    """The worst subset of the rest that was found, on these rows.

    Args:
        gated: the model.
        rows: prompts that the adversary sees.
        keep: site → bool `(width,)`, the circuit.
        calibrated: makes of logits `(n, 2)` and their rows those that count.
        generator: of the starts.
        steps: of the ascent.
        rate: see [`ascend`].
        restarts: starts, each from another random subset.
        most: how many nodes it may have.
        begin: subsets to start from beside those, site → bool `(width,)`.

    Returns:
        Site → bool `(width,)`, the circuit's nodes not among them.
    """
    gates = {site: mask[None] for site, mask in keep.items()}
    prepared = gated.prepare(rows)
    worst: dict[str, Tensor] = {}
    highest = -float("inf")
    widths = {site: len(mask) for site, mask in keep.items()}
    for start in [*begin, *(random_superset(widths, generator) for _ in range(restarts))]:
        start = {s: m[None].float() for s, m in start.items()}
        outside = ascend(
            gated, rows, gates, start, lambda pairs: binary_loss(calibrated(pairs, rows)), steps,
            rate, prepared, most,
        )  # fmt: skip
        chosen = {s: (gate[0] > 0.5).cpu() & ~keep[s].cpu() for s, gate in outside.items()}
        with torch.no_grad():
            both = {s: (keep[s].cpu() | mask)[None] for s, mask in chosen.items()}
            reached = binary_loss(calibrated(gated.run(rows, both, prepared).cpu(), rows)).item()
        if reached > highest:
            worst, highest = chosen, reached
    return worst
