"""What a model that becomes sparse can learn from the dense one that it was."""

from copy import deepcopy

import torch
from torch import nn
from torch.nn import functional as F


def as_teacher(model: nn.Module) -> nn.Module:
    """A copy of `model` as it is now, which is never trained."""
    return deepcopy(model).requires_grad_(False).eval()


def kl_to_teacher(
    logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    labels: torch.Tensor,
    num_items: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """KL divergence of the next token, from what a teacher predicts to what is predicted.

    Args:
        logits: `(batch, tokens, vocabulary)`.
        teacher_logits: of the teacher, the same shape.
        labels: `(batch, tokens)`, not shifted; where the next one is -100, nothing is taught.
        num_items: what the sum is divided by, where that is not the number of taught tokens.

    Returns:
        Nats per token, float32.
    """
    taught = labels[:, 1:] != -100
    predicted = F.log_softmax(logits[:, :-1][taught].float(), -1)
    target = F.log_softmax(teacher_logits[:, :-1][taught].float(), -1)
    divergence = F.kl_div(predicted, target, reduction="sum", log_target=True)
    return divergence / (taught.sum().clamp(min=1) if num_items is None else num_items)
