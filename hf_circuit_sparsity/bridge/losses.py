"""What bridges are trained on (Gao et al. 2025, bridges): normalized errors and divergences."""

from dataclasses import dataclass

import torch
from torch.nn import functional as F
from transformers.modeling_outputs import ModelOutput

# The five loss terms, by the name of their weight.
LOSS_TERMS = ("lm", "kl", "nmse", "dense_to_sparse", "sparse_to_dense")
# The outputs that have one value per location.
BY_LOCATION = ("encode_nmse", "decode_nmse", "dense_to_sparse_kl", "sparse_to_dense_kl")


@dataclass
class BridgeOutput(ModelOutput):
    """Output of a [`BridgedCausalLM`]; losses are means, in nats per token or as shares.

    Attributes:
        loss: weighted sum of the terms below; `None` without `labels`.
        lm: cross-entropy of the sparse model.
        kl: KL(dense ‖ sparse).
        nmse: mean over locations of `encode_nmse + decode_nmse`.
        dense_to_sparse, sparse_to_dense: mean over the hybrid runs asked for of KL(dense ‖ hybrid).
        encode_nmse, decode_nmse: `(2L + 1,)`, [`normalized_mse`] of the encoded dense stream
            against the sparse one, and of the decoded sparse stream against the dense one.
        dense_to_sparse_kl, sparse_to_dense_kl: the KL of each hybrid run, in the order asked for.
        sparse_logits, dense_logits: `(B, T, V)`.
    """

    loss: torch.Tensor | None = None
    lm: torch.Tensor | None = None
    kl: torch.Tensor | None = None
    nmse: torch.Tensor | None = None
    dense_to_sparse: torch.Tensor | None = None
    sparse_to_dense: torch.Tensor | None = None
    encode_nmse: torch.Tensor | None = None
    decode_nmse: torch.Tensor | None = None
    dense_to_sparse_kl: torch.Tensor | None = None
    sparse_to_dense_kl: torch.Tensor | None = None
    sparse_logits: torch.Tensor | None = None
    dense_logits: torch.Tensor | None = None


def normalized_mse(
    estimate: torch.Tensor, target: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Squared error over the target's variance: 0 is perfect, 1 as good as the target's mean.

    Args:
        estimate, target: `(B, T, D)`. The variance is over tokens, summed over channels.
        mask: bool `(B, T)`, the tokens that count.

    Returns:
        A float32 scalar.
    """
    estimate, target = estimate.float(), target.float()
    if mask is not None:
        estimate, target = estimate[mask], target[mask]
    estimate, target = estimate.flatten(0, -2), target.flatten(0, -2)
    variance = (target - target.mean(0)).square().mean()
    return (estimate - target).square().mean() / variance.clamp(min=1e-12)


def mean_kl(
    reference: torch.Tensor, logits: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """KL(reference ‖ other), in nats per token.

    Args:
        reference, logits: `(B, T, V)`.
        mask: bool `(B, T)`, the tokens that count.
    """
    if mask is not None:
        reference, logits = reference[mask], logits[mask]
    expected = reference.float().flatten(0, -2).log_softmax(-1)
    actual = logits.float().flatten(0, -2).log_softmax(-1)
    return F.kl_div(actual, expected, reduction="batchmean", log_target=True)
