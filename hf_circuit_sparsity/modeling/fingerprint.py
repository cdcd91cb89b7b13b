"""Which model is this? A short name that follows from the weights alone."""

import hashlib

import torch
from torch import nn


def model_fingerprint(model: nn.Module) -> str:
    """16 hexadecimal digits of a SHA-256 over the names, shapes and values of all weights.

    Values are rounded to bfloat16 first, so that a checkpoint has the same fingerprint whether it
    is loaded in float32 or in bfloat16. The sign of a zero does not count: where only the nonzeros
    are stored, zeros have none.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        values = tensor.detach().to(device="cpu", dtype=torch.bfloat16).contiguous()
        values = values + 0.0
        digest.update(values.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]
