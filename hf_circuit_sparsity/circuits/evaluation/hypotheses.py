"""A circuit's smallness and the silence of the rest as hypothesis tests (Shi et al. 2024).

Minimality asks of every node whether it does more than nodes that do not belong to the circuit;
independence, whether what the model answers can still be seen in what it answers without the
circuit (NeurIPS 2024, arXiv 2410.13032).
"""

import torch
from torch import Tensor, nn

from ..ablation import TOKENS, hooked
from ..circuit import Circuit
from ..gating import GatedModel, Gates, frozen_weights
from ..task_scores import TaskTensors, trimmed

LEVEL = 0.05
"""Share of the others that may do as much as a node that is needed."""
_OTHERS = 40
# Of larger circuits so many nodes are tested, drawn at random; the share is then off by 0.05 or so.
_INSIDE = 100
_ROWS = 512


def needed_share(
    circuit: Circuit, model: nn.Module, tensors: TaskTensors, generator: torch.Generator
) -> float:
    """The share of a circuit's nodes that change its answers more than other nodes would.

    What a node does is the mean change of the difference between the candidates' logits when it is
    taken out of the circuit. Others are nodes of the rest, each added to the circuit by itself,
    drawn from those that then do anything at all; a node is needed if at most one in twenty of
    them does as much. In Shi et al. 2024 (section 4) it is edges, and paths that are added.

    Args:
        circuit: not empty.
        model: in eval mode.
        tensors: prompts.
        generator: draws the others, and of circuits of more than 100 nodes those that are tested.
    """
    keep, means = circuit.masks_and_means(model)
    gated, rows = GatedModel(model, means), trimmed(tensors)
    with hooked(circuit.edge_cuts(model)):
        others = _others(gated, keep, rows, generator)
        inside = [
            (s, i) for s, m in keep.items() if s != TOKENS for i in m.nonzero()[:, 0].tolist()
        ]
        if len(inside) > _INSIDE:
            inside = [inside[i] for i in torch.randperm(len(inside), generator=generator)[:_INSIDE]]
        changes = _changes(gated, keep, rows, [*inside, *others])
    done, by_others = changes[: len(inside)], changes[len(inside) :]
    # Without others that do anything: whatever does.
    bound = by_others.quantile(1 - LEVEL) if len(others) else torch.zeros(())
    return (done > bound).float().mean().item()


def _others(
    gated: GatedModel, keep: Gates, rows: TaskTensors, generator: torch.Generator
) -> list[tuple[str, int]]:
    """Nodes outside whose gate the answer depends on, to first order."""
    gates = {site: mask[None].float().requires_grad_() for site, mask in keep.items()}
    with frozen_weights(gated.model), torch.enable_grad():
        pairs = gated.run(rows, gates)
        total = (pairs[:, 0] - pairs[:, 1]).square().sum()
        gradients = torch.autograd.grad(total, list(gates.values()), allow_unused=True)
    found = [
        (site, i)
        for (site, mask), gradient in zip(keep.items(), gradients, strict=True)
        if gradient is not None and site != TOKENS
        for i in ((gradient[0].cpu() != 0) & ~mask).nonzero()[:, 0].tolist()
    ]
    return [found[i] for i in torch.randperm(len(found), generator=generator)[:_OTHERS].tolist()]


@torch.no_grad()
def _changes(
    gated: GatedModel, keep: Gates, rows: TaskTensors, nodes: list[tuple[str, int]]
) -> Tensor:
    """`(nodes,)`: how far the logit difference moves when a node's gate is turned, on average."""
    prepared = gated.prepare(rows)
    count = len(rows["target_ids"])

    def differences(turned: list[tuple[str, int]]) -> Tensor:
        gates = {site: mask.repeat(len(turned) + 1, 1) for site, mask in keep.items()}
        for row, (site, i) in enumerate(turned):
            gates[site][row, i] ^= True
        pairs = gated.run(rows, gates, prepared, len(turned) + 1).cpu()
        by_gates = (pairs[:, 0] - pairs[:, 1]).unflatten(0, (len(turned) + 1, -1))
        return (by_gates[:-1] - by_gates[-1]).abs().mean(1)

    step = max(1, _ROWS // count)
    return torch.cat([differences(nodes[i : i + step]) for i in range(0, len(nodes), step)])


def independence_p_value(
    first: Tensor, second: Tensor, generator: torch.Generator, permutations: int = 200
) -> float:
    """The p-value of the hypothesis that two samples are independent.

    The Hilbert–Schmidt independence criterion with Gaussian kernels, as wide as the median
    distance, against that of permuted pairs (Gretton et al. 2007; Shi et al. 2024, section 3).

    Args:
        first: `(n,)`.
        second: `(n,)`, paired with it.
        generator: draws the permutations.
        permutations: how many; the smallest p-value is `1 / (permutations + 1)`.
    """
    k, centred = _kernel(first), _kernel(second)
    centred = centred - centred.mean(0) - centred.mean(1, keepdim=True) + centred.mean()
    observed = (k * centred).sum()
    reached = 0
    for _ in range(permutations):
        order = torch.randperm(len(first), generator=generator)
        reached += bool((k[order][:, order] * centred).sum() >= observed)
    return (1 + reached) / (1 + permutations)


def _kernel(values: Tensor) -> Tensor:
    distances = (values[:, None] - values[None, :]).double().abs()
    width = distances[distances > 0].median() if (distances > 0).any() else torch.ones(())
    return (-(distances**2) / (2 * width**2)).exp()
