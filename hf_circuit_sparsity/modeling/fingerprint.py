"""Which model is this? A short name that follows from the weights alone."""

import hashlib
from weakref import WeakKeyDictionary

import torch
from torch import nn

# Model → what its weights were when they were last hashed, and their fingerprint.
_known: WeakKeyDictionary[nn.Module, tuple[tuple, str]] = WeakKeyDictionary()


def model_fingerprint(model: nn.Module) -> str:
    """16 hexadecimal digits of a SHA-256 over the names, shapes and values of all weights.

    Values are rounded to bfloat16 first, so that a checkpoint has the same fingerprint whether it
    is loaded in float32 or in bfloat16. The sign of a zero does not count: where only the nonzeros
    are stored, zeros have none.

    Layers that PEFT put around others and `torch.compile` do not count either: the fingerprint is
    that of the model inside.

    Hashing is slow, so it is done once per version of the weights. Every call compares checksums of
    all of them, however they were changed.
    """
    weights = sorted(_own_weights(model).items())
    version = tuple((name, tensor.dtype, *_checksum(tensor)) for name, tensor in weights)
    if model not in _known or _known[model][0] != version:
        _known[model] = version, _digest(weights)
    return _known[model][1]


def _own_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """By name, as if nothing had been put around any part of the model."""
    inside = ("base_layer", "original_module")  # where PEFT keeps what it replaced
    wrapped = {
        f"{name}.": f"{name}.{part}."
        for name, module in model.named_modules()
        for part in inside
        if part in module._modules
    }
    weights = {}
    for name, tensor in model.state_dict().items():
        for prefix, kept in wrapped.items():
            if name.startswith(prefix):
                name = prefix + name.removeprefix(kept) if name.startswith(kept) else ""
        if name:
            weights[name.replace("_orig_mod.", "")] = tensor
    return weights


def _checksum(tensor: torch.Tensor) -> tuple[tuple[int, ...], int]:
    """The shape, and a hash of the sums of the bits along rows and along columns.

    Autograd's version counters would not do: writing to `weight.data` does not raise them.
    """
    if not tensor.numel():
        return tuple(tensor.shape), 0
    row = tensor.shape[-1] * tensor.element_size() if tensor.dim() else tensor.element_size()
    words = torch.int8 if row % 4 else torch.int32
    bits = tensor.detach().contiguous().reshape(-1, row // tensor.element_size())
    bits = bits.view(words)
    # Sums of int32 may overflow; modulo 2^32 they still tell, and are ten times as fast.
    sums = torch.cat([bits.sum(axis, dtype=torch.int32) for axis in (0, 1)])
    return tuple(tensor.shape), hash(sums.cpu().numpy().tobytes())


def _digest(weights: list[tuple[str, torch.Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in weights:
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        values = tensor.detach().to(device="cpu", dtype=torch.bfloat16).contiguous() + 0.0
        digest.update(values.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]
