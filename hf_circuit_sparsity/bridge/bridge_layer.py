"""The encoder and decoder between the two residual streams at one location."""

import torch
from torch import nn
from torch.nn import functional as F

from ..modeling.functional import abs_topk


class Bridge(nn.Module):
    """The encoder and decoder of one location.

    Both see the dense stream standardized, channel by channel: `encoder` reads and `decoder`
    writes `(x - dense_mean) / dense_scale`. The length of the dense stream is arbitrary and differs
    tens of times between models and locations; a step of the optimizer would move an estimate in
    proportion to it. The two are constants, as the dense model is frozen, so both maps stay affine.

    Args:
        dense_width, sparse_width: channels of the two residual streams.
        k: sparse channels that the encoder keeps, by magnitude; `None` for all.
        bias: whether both have biases.
    """

    dense_mean: torch.Tensor
    dense_scale: torch.Tensor

    def __init__(self, dense_width: int, sparse_width: int, k: int | None, bias: bool = True):
        super().__init__()
        self.encoder = nn.Linear(dense_width, sparse_width, bias=bias)
        self.decoder = nn.Linear(sparse_width, dense_width, bias=bias)
        self.register_buffer("dense_mean", torch.zeros(dense_width))
        self.register_buffer("dense_scale", torch.ones(dense_width))
        self.k = k
        # The stream of a fresh sparse model is small; an encoder that starts far above it would
        # dominate the first steps.
        nn.init.normal_(self.encoder.weight, std=0.02 / dense_width**0.5)
        if bias:
            nn.init.zeros_(self.encoder.bias)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """`(..., dense_width)` to `(..., sparse_width)`."""
        x = (x.to(self.encoder.weight.dtype) - self.dense_mean) / self.dense_scale
        y = self.encoder(x)
        return y if self.k is None else abs_topk(y, self.k)

    def decode(self, y: torch.Tensor) -> torch.Tensor:
        """`(..., sparse_width)` to `(..., dense_width)`."""
        x = self.decoder(y.to(self.decoder.weight.dtype))
        return self.dense_mean + self.dense_scale * x

    def decode_change(self, change: torch.Tensor) -> torch.Tensor:
        """The change of the dense stream for a change `(..., sparse_width)` of the sparse one."""
        weight = self.decoder.weight
        return self.dense_scale * F.linear(change.to(weight.dtype), weight)

    @property
    def is_standardized(self) -> bool:
        """Whether the dense stream has been measured."""
        return not bool((self.dense_scale == 1).all())

    @torch.no_grad()
    def standardize_(self, mean: torch.Tensor, variance: torch.Tensor) -> None:
        """Standardize by the dense stream's mean and variance, `(dense_width,)` each.

        The weights stay, so what the bridge computes changes.
        """
        # The floor keeps the noise of a nearly constant channel from being blown up.
        scale = variance.clamp(min=1e-6 * variance.mean().item()).sqrt()
        self.dense_mean.copy_(mean)
        self.dense_scale.copy_(torch.where(scale > 0, scale, torch.ones_like(scale)))
