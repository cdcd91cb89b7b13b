"""Where a channel of a sparse model acts on the residual stream (Gao et al. 2025, bridges)."""

import re
from typing import NamedTuple

import torch
from torch.nn import functional as F

from ..modeling.modeling_circuitgpt import CircuitGPTForCausalLM
from ..optim.settings import is_whole

RESIDUAL_SITES = ("act_in", "resid_delta")
_SITE = re.compile(r"h\.(\d+)\.(attn|mlp)\.(\w+)")


class SteeringPoint(NamedTuple):
    """What steering one channel of a sparse model changes in its residual stream.

    Attributes:
        location: of the residual stream.
        direction: `(d_model,)`, the change of the stream per unit of the channel.
        is_residual: whether the channel is one of the residual stream itself.
    """

    location: int
    direction: torch.Tensor
    is_residual: bool


def check_location(sparse: CircuitGPTForCausalLM, location: int) -> int:
    """Return `location`.

    Raises:
        ValueError: the model has no such location.
    """
    n_layer = sparse.config.n_layer
    if not (is_whole(location, 0) and location <= 2 * n_layer):
        raise ValueError(
            f"There is no location {location!r}: a model of {n_layer} layers has 0 (after the "
            f"embedding) to {2 * n_layer} (after the last MLP); 2i + 1 is after the attention of "
            "layer i, 2i + 2 after its MLP."
        )
    return location


def location_name(location: int) -> str:
    """What a residual location is called in tables."""
    if location == 0:
        return "embedding"
    layer, part = divmod(location - 1, 2)
    return f"layer {layer} {'MLP' if part else 'attention'}"


def steering_point(sparse: CircuitGPTForCausalLM, where: int | str, channel: int) -> SteeringPoint:
    """What steering `channel` at `where` changes.

    Args:
        sparse: the sparse model.
        where: a location or a node site; see [`BridgedCausalLM.steer`].
        channel: its index there.

    Raises:
        ValueError: there is no such location, site or channel, or it does not write to the stream.
    """
    n_layer, width = sparse.config.n_layer, sparse.config.d_model
    if not isinstance(where, str):
        location, name, site_width = check_location(sparse, where), "act_in", width
    else:
        sites, match = sparse.node_sites(), _SITE.fullmatch(where)
        if match is None or where not in sites:
            raise ValueError(
                f"There is no site {where!r} in the sparse model; its sites are those of "
                f"node_sites(), h.0.attn.act_in to h.{n_layer - 1}.mlp.resid_delta."
            )
        layer, part, name = int(match[1]), match[2], match[3]
        if name in ("q", "k"):
            raise ValueError(
                f"{where} decides where attention looks and writes nothing to the residual stream, "
                f"so it has no counterpart in the dense one; steer h.{layer}.attn.act_in, .v or "
                ".resid_delta."
            )
        location = 2 * layer + (1 if part == "attn" else 2) - (name == "act_in")
        site_width = sites[where].width
    is_residual = name in RESIDUAL_SITES
    # Channels past d_model are concatenated positions, which no bridge carries.
    n_channels = min(site_width, width) if is_residual else site_width
    if not (is_whole(channel, 0) and channel < n_channels):
        where = where if isinstance(where, str) else f"location {where}"
        raise ValueError(
            f"There is no channel {channel!r} at {where}; its channels are 0 to {n_channels - 1}."
        )
    if is_residual:
        direction = F.one_hot(torch.tensor(channel), width).to(sparse.device, sparse.dtype)
        return SteeringPoint(location, direction, True)
    write = sparse.get_submodule(f"transformer.h.{layer}.{part}.c_proj").weight
    return SteeringPoint(location, write[:, channel].detach(), False)
