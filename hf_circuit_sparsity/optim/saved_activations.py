"""What autograd keeps of activations between forward and backward pass, as their nonzeros.

AbsTopK leaves a quarter of the activations (Gao et al. 2025), yet layers keep their whole inputs
for the backward pass. Within [`compact_activations`] tensors that are mostly zero are kept as their
nonzeros and a bit for every entry, booleans as bits, and what a MLP's activation function reads as
those entries that its AbsTopK keeps, since no other has a gradient.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..kernels.cpu import compiled_kernels
from ..modeling.functional import abs_topk
from ..modeling.modeling_circuitgpt import CircuitGPTMLP
from .sparse_compute import ReplacedForwards

# Up to this share of nonzeros they are kept alone. With the bits that is 0.53 of the memory; a look
# at a sample settles most.
MAX_NONZERO = 0.5
_SAMPLE = 1024
# Smaller tensors are not worth a call.
_MIN_ENTRIES = 1 << 14
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Compact:
    """A dense tensor without its zeros.

    Attributes:
        shape, stride: of the tensor, which fills its memory without gaps.
        bits: uint8 `(entries / 8,)`, a bit per entry in the order of memory, lowest first: set
            where it is not zero.
        values: `(nonzeros,)` in that order; None of a boolean tensor.
    """

    shape: torch.Size
    stride: tuple[int, ...]
    bits: Tensor
    values: Tensor | None

    @classmethod
    def of(cls, x: Tensor) -> "Compact | None":
        """The tensor without its zeros; None if that does not pay or cannot be had."""
        if x.dtype not in (torch.bool, *_FLOATS) or x.layout != torch.strided:
            return None
        flat = _flat(x.detach())
        if flat is None or flat.numel() < _MIN_ENTRIES:
            return None
        if x.dtype == torch.bool:
            return cls(x.shape, x.stride(), pack_bits(flat), None)
        sample = flat[:: max(1, flat.numel() // _SAMPLE)]
        if torch.count_nonzero(sample) > 1.2 * MAX_NONZERO * len(sample):
            return None
        bits, values = pack(flat)
        if len(values) > MAX_NONZERO * len(flat):
            return None
        return cls(x.shape, x.stride(), bits, values)

    def dense(self) -> Tensor:
        """The tensor as it was, but for the signs of zeros."""
        n = prod(self.shape)
        if self.values is None:
            flat = unpack_bits(self.bits, n)
        else:
            flat = unpack(self.bits, self.values, n)
        return flat.as_strided(self.shape, self.stride)


def _flat(x: Tensor) -> Tensor | None:
    """The entries in the order of memory; None where they have gaps or share places."""
    order = sorted(range(x.dim()), key=lambda d: (-x.stride(d), -x.shape[d]))
    x = x.permute(order)
    return x.view(-1) if x.is_contiguous() else None


def pack(flat: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A bit per entry, uint8 `(entries / 8,)`, and those entries of a vector that have one.

    Args:
        flat: `(n,)`.
        mask: bool `(n,)`, which to take; the nonzeros if not given.
    """
    if kernels := compiled_kernels(flat):
        return kernels.pack(flat, mask)
    mask = flat != 0 if mask is None else mask
    return pack_bits(mask), flat[mask]


def unpack(bits: Tensor, values: Tensor, n: int) -> Tensor:
    """The vector of `n` entries that [`pack`] was given, with zeros for what it did not take."""
    if kernels := compiled_kernels(values):
        return kernels.unpack(bits, values, n)
    return values.new_zeros(n).masked_scatter_(unpack_bits(bits, n), values)


def pack_bits(mask: Tensor) -> Tensor:
    """A boolean vector as bits, uint8 `(entries / 8,)`, lowest first."""
    if mask.device.type == "cpu":
        return torch.from_numpy(np.packbits(mask.numpy(), bitorder="little"))
    return pack_bits_reference(mask)


def unpack_bits(bits: Tensor, n: int) -> Tensor:
    """The boolean vector of `n` entries that [`pack_bits`] was given."""
    if bits.device.type == "cpu":
        unpacked = np.unpackbits(bits.numpy(), count=n, bitorder="little")
        return torch.from_numpy(unpacked).view(torch.bool)
    return unpack_bits_reference(bits, n)


def pack_bits_reference(mask: Tensor) -> Tensor:
    """[`pack_bits`] by torch alone, as on other devices than the CPU."""
    padded = nn.functional.pad(mask.byte(), (0, -len(mask) % 8)).view(-1, 8)
    places = torch.arange(8, device=mask.device, dtype=torch.uint8)
    return (padded << places).sum(-1, dtype=torch.uint8)


def unpack_bits_reference(bits: Tensor, n: int) -> Tensor:
    """[`unpack_bits`] by torch alone."""
    places = torch.arange(8, device=bits.device, dtype=torch.uint8)
    return ((bits[:, None] >> places) & 1).bool().flatten()[:n]


@contextmanager
def compact_activations(model: nn.Module) -> Iterator[None]:
    """Within it, graphs of `model` keep activations without their zeros for the backward pass.

    The forward pass must be within it, and where layers are checkpointed the backward pass, too.
    Losses are the same to the bit, gradients to the rounding of an activation function's
    derivative; they cannot be differentiated again (a `RuntimeError`). It takes time and saves
    memory (`benchmarks/speed/memory.py`). Tensors of other dtypes, small ones, and those that are
    mostly not zero are kept as they are, as are parameters and buffers.
    """
    kept = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    # Several layers may read, and keep, one tensor: by the tensor that owns the memory.
    known: Any = WeakTensorKeyDictionary()

    def put_away(x: Tensor) -> Tensor | Compact:
        if type(x) is not Tensor or x.untyped_storage()._cdata in kept:
            return x
        owner = x if x._base is None else x._base
        place = (x._version, x.storage_offset(), x.shape, x.stride())
        seen = known.setdefault(owner, {})
        if place not in seen:
            seen[place] = Compact.of(x)
        return x if seen[place] is None else seen[place]

    def take_out(stored: Tensor | Compact) -> Tensor:
        return stored.dense() if isinstance(stored, Compact) else stored

    mlps = [module for module in model.modules() if type(module) is CircuitGPTMLP]
    with ExitStack() as stack:
        stack.enter_context(ReplacedForwards(mlps, _CompactMLP))
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(put_away, take_out))
        yield


class _CompactMLP:
    """The forward pass of an MLP that keeps of its neurons' inputs what AbsTopK lets through."""

    def __init__(self, mlp: CircuitGPTMLP) -> None:
        self.mlp = mlp

    def __call__(self, x: Tensor) -> Tensor:
        mlp = self.mlp
        hooked = any(m._forward_hooks or m._forward_pre_hooks for m in (mlp.act_fn, mlp.post_act))
        k = mlp.post_act.k
        whole = k is None or k >= mlp.post_act.width
        if whole or hooked or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return type(mlp).forward(mlp, x)
        neurons = _ActivationTopK.apply(mlp.c_fc(mlp.act_in(x)), mlp.act_fn, k)
        return mlp.resid_delta(mlp.dropout(mlp.c_proj(neurons)))


class _ActivationTopK(torch.autograd.Function):
    """`abs_topk(act(x), k)`, which remembers `x` where it has a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, act: nn.Module, k: int) -> Tensor:
        neurons = act(x)
        if kernels := compiled_kernels(neurons):
            out, mask = kernels.abs_topk(neurons, k, want_mask=True)
        else:
            with torch.enable_grad():
                out = abs_topk(neurons.requires_grad_(), k)
            (mask,) = torch.autograd.grad(out, neurons, torch.ones_like(out))
            out, mask = out.detach(), mask.bool()
        ctx.act, ctx.shape = act, x.shape
        ctx.save_for_backward(*pack(x.reshape(-1), mask.view(-1)))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # `once_differentiable` would let torch.autograd.grad pass
            raise RuntimeError(
                "A gradient that can be differentiated again was asked for within "
                "compact_activations, which keeps too little for that; ask for it outside."
            )
        (bits, values), n = ctx.saved_tensors, prod(ctx.shape)
        _, grad = pack(grad.reshape(-1), unpack_bits(bits, n))
        with torch.enable_grad():
            x = values.detach().requires_grad_()
            (grad,) = torch.autograd.grad(ctx.act(x), x, grad)
        return unpack(bits, grad, n).view(ctx.shape), None, None
