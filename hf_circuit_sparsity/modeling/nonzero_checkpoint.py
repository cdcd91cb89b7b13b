"""Puts the nonzeros of a checkpoint into a model that holds nothing else, while it is trained."""

import os

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_NAME

from .csr import CSR
from .sparse_checkpoint import PARTS, unpack
from .sparse_layers import sparse_layers


@torch.no_grad()
def load_nonzeros(model: PreTrainedModel, folder: str | os.PathLike) -> None:
    """Load what ``save_pretrained(folder, sparse=True)`` wrote, in place, parameters staying the
    objects they are; no matrix is made dense that was not stored dense.

    Args:
        model: with layers of :func:`sparse_layers`; anything else in it is loaded as ever.

    Raises:
        ArtifactError: a tensor is damaged, lacking, or of another shape than the model's.
        FileNotFoundError: there is no such file.
    """
    path = os.path.join(folder, SAFE_WEIGHTS_NAME)
    stored = load_file(path)
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    layers = sparse_layers(model)
    for name, layer in layers.items():
        key = f"{name}.weight"
        key = key if f"{key}{PARTS[0]}" in stored or key in stored else tied.get(key, key)
        if key in stored:
            csr = CSR.from_dense(stored[key])
        else:
            found = {part: stored[key + part] for part in PARTS if key + part in stored}
            csr = unpack(path, key, found, layer.shape)
        layer.assign(csr)
    own = {f"{name}.weight" for name in layers}
    rest = {n: t for n, t in stored.items() if n not in own and not n.endswith(PARTS)}
    for name, target in model.named_parameters():
        if name in rest:
            target.copy_(rest[name])
        elif f"{name}{PARTS[0]}" in stored:  # few nonzeros, yet a dense parameter
            found = {part: stored[name + part] for part in PARTS}
            target.copy_(unpack(path, name, found, tuple(target.shape)).to_dense())
    for name, target in model.named_buffers():
        if name in rest:
            target.copy_(rest[name])
