"""Reads the masks of OpenAI's released circuits, their `viz_data.pt`.

Its `circuit_data` holds the indices of the kept nodes by site, named as `0.attn.k` (see
`circuit_sparsity/viz.py` of their release); what else is in the file is for their viewer.
"""

import os
import re
from collections.abc import Mapping
from typing import Any

import torch

from ..modeling.configuration_circuitgpt import ArtifactError
from ..modeling.openai_checkpoint import read_pickle

# How it was searched; and channels of the stream before the unembedding, where no node of ours is.
_NO_SITES = ("prune_config", "final_resid")
_SITE = re.compile(r"(\d+)\.((?:attn|mlp)\.\w+)")


def read_openai_masks(path: str | os.PathLike, widths: Mapping[str, int]) -> dict[str, list[int]]:
    """Site → indices of the kept nodes. Nothing in the file is executed.

    Args:
        path: of `viz_data.pt`.
        widths: site of the model → number of nodes.

    Raises:
        ArtifactError: the file is damaged, has no masks, or one that does not fit the model.
    """
    data = read_pickle(path).get("circuit_data")
    if not isinstance(data, dict):
        raise ArtifactError(path, ' has no masks: expected a dict named "circuit_data".')
    nodes = {}
    for name, mask in data.items():
        if name in _NO_SITES:
            continue
        match = _SITE.fullmatch(name) if isinstance(name, str) else None
        site = f"h.{match[1]}.{match[2]}" if match else ""
        if site not in widths:
            raise ArtifactError(path, f" has the site {name!r:.80}, which this model has not.")
        nodes[site] = _indices(path, name, mask, widths[site])
    if not any(nodes.values()):
        raise ArtifactError(path, " keeps no node at any site named as 0.attn.k.")
    return nodes


def _indices(path: str | os.PathLike, name: str, mask: Any, width: int) -> list[int]:
    """The indices of one site, which may also be a bool per node."""
    expected = f"expected indices below {width}, or a bool for each of {width} nodes"
    is_flat = isinstance(mask, torch.Tensor) and mask.dim() == 1
    if is_flat and not len(mask):  # whatever its dtype: torch.tensor([]) is one of floats
        return []
    if not is_flat or mask.is_floating_point() or mask.is_complex():
        kind = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, torch.Tensor) else type(mask)
        raise ArtifactError(path, f" has {name!r} of {kind}, {expected}.")
    if mask.dtype == torch.bool and len(mask) == width:
        mask = mask.nonzero()[:, 0]
    indices = mask.tolist()
    outside = [i for i in indices if type(i) is not int or not 0 <= i < width]
    if outside or len(set(indices)) != len(indices):
        raise ArtifactError(
            path, f" has {name!r} with {outside[:3] or 'an index twice'}, {expected}."
        )
    return indices
