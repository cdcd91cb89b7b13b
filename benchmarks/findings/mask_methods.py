"""Other ways to end with few nonzeros, each beside the AdamW of annealed top-k.

They are what random coordinate descent is compared with, and nothing that the package offers: all
of them hold dense weights, gradients and moments.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hf_circuit_sparsity.optim.projection import nonzero_budget, project_topk_
from hf_circuit_sparsity.optim.topk_adamw import TopKAdamW

Prune = Callable[[Tensor, float], None]


def keep_at_density(min_nonzeros: int, row_dims: dict[Tensor, int]) -> Prune:
    """A function that keeps so large a share of a weight's largest entries, in place."""

    def prune(weight: Tensor, density: float) -> None:
        minimum = min_nonzeros if weight.ndim > 1 else 0
        budget = nonzero_budget(weight.numel(), density)
        project_topk_(weight, budget, minimum, row_dims.get(weight, 0))

    return prune


def gradual_pruning(
    optimizer: TopKAdamW, weights: Sequence[Tensor], density: float, steps: int, prune: Prune
) -> None:
    """GMP (Zhu & Gupta 2017, section 3): once pruned, a weight stays so; the share that is pruned
    rises as 1 - (1 - t)³ until half of the steps, twice in every hundredth of them."""
    masks: dict[Tensor, Tensor] = {}
    every, end, done = max(1, steps // 200), steps / 2, 0

    def after(*_: object) -> None:
        nonlocal done
        done += 1
        share = 1 - (1 - min(1.0, done / end)) ** 3
        with torch.no_grad():
            for weight in weights:
                if weight in masks:
                    weight.mul_(masks[weight])
                if done % every == 0 and done <= end + every:
                    prune(weight, 1 - share * (1 - density))
                    masks[weight] = weight != 0

    optimizer.register_step_post_hook(after)


def alternating_phases(
    optimizer: TopKAdamW, weights: Sequence[Tensor], density: float, steps: int, prune: Prune
) -> None:
    """AC/DC (Peste et al. 2021): dense and sparse phases by turns, each a twentieth of the steps,
    the first one dense, the last quarter sparse."""
    masks: dict[Tensor, Tensor] = {}
    phase, done = max(1, steps // 20), 0

    def sparse(step: int) -> bool:
        return step >= 0.75 * steps or step // phase % 2 == 1

    def after(*_: object) -> None:
        nonlocal done
        done += 1
        with torch.no_grad():
            for weight in weights:
                if not sparse(done):
                    continue
                if not sparse(done - 1):
                    prune(weight, density)
                    masks[weight] = weight != 0
                weight.mul_(masks[weight])

    optimizer.register_step_post_hook(after)


def straight_through(
    optimizer: TopKAdamW, weights: Sequence[Tensor], density: float, steps: int, prune: Prune
) -> None:
    """The model computes with the largest weights alone, and what moves by their gradients are all
    of the dense weights behind them (STE; as in Jayakumar et al. 2020, "Top-KAST", with a dense
    backward pass)."""
    latent: dict[Tensor, Tensor] = {}

    def before(*_: object) -> None:
        with torch.no_grad():
            for weight in latent:
                weight.copy_(latent[weight])

    def after(*_: object) -> None:
        with torch.no_grad():
            for weight in weights:
                latent[weight] = weight.detach().clone()
                prune(weight, density)

    after()
    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)


METHODS = {"gmp": gradual_pruning, "acdc": alternating_phases, "ste": straight_through}
