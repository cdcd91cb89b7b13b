"""What bridges are trained on (Gao et al. 2025, METHOD 4): normalized errors and divergences."""

import torch
from torch.nn import functional as F


def normalized_mse(
    estimate: torch.Tensor, target: torch.Tensor, real: torch.Tensor | None = None
) -> torch.Tensor:
    """Squared error over the target's variance: 0 is perfect, 1 as good as the target's mean.

    Args:
        estimate, target: `(B, T, D)`. The variance is over tokens, summed over channels.
        real: bool `(B, T)`, the tokens that count.

    Returns:
        A float32 scalar.
    """
    estimate, target = estimate.float(), target.float()
    if real is not None:
        estimate, target = estimate[real], target[real]
    estimate, target = estimate.flatten(0, -2), target.flatten(0, -2)
    variance = (target - target.mean(0)).square().mean()
    return (estimate - target).square().mean() / variance.clamp(min=1e-12)


def mean_kl(
    reference: torch.Tensor, logits: torch.Tensor, real: torch.Tensor | None = None
) -> torch.Tensor:
    """KL(reference ‖ other), in nats per token.

    Args:
        reference, logits: `(B, T, V)`.
        real: bool `(B, T)`, the tokens that count.
    """
    if real is not None:
        reference, logits = reference[real], logits[real]
    wanted = reference.float().flatten(0, -2).log_softmax(-1)
    found = logits.float().flatten(0, -2).log_softmax(-1)
    return F.kl_div(found, wanted, reduction="batchmean", log_target=True)
