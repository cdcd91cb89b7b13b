"""Moving one channel of a sparse twin and letting the dense model feel it (METHOD 4)."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

_SITE = re.compile(r"h\.(\d+)\.(attn|mlp)\.(\w+)")
MODES = ("add", "set")


@contextmanager
def steered(
    bridged: Any,
    where: int | str,
    channel: int,
    strength: float,
    mode: str = "add",
    positions: int | Sequence[int] | None = None,
) -> Iterator[Any]:
    """See `BridgedCausalLM.steer`."""
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} is not known; use {' or '.join(map(repr, MODES))}.")
    location, write = steering_place(bridged, where, channel)
    if mode == "set" and write is not None:
        raise ValueError(
            f"mode=\"set\" needs the channel's value, which the dense model's stream does not hold "
            f'for {where}; use mode="add", or a residual site.'
        )
    bridge = bridged.bridges[location]

    def edit(x: torch.Tensor) -> torch.Tensor:
        change = x.new_zeros((), dtype=bridge.decoder.weight.dtype) + strength
        if mode == "set":
            change = strength - bridge.encode(x)[..., channel, None]
        # The decoder is linear, so the difference it makes is that of its input, decoded.
        direction = decoded_direction(bridged, location, channel, write)
        delta = (change * direction).to(x.dtype).expand_as(x)
        if positions is None:
            return x + delta
        chosen = [positions] if isinstance(positions, int) else list(positions)
        length = x.shape[1]
        chosen = [p for p in chosen if -length <= p < length]
        x = x.clone()
        x[:, chosen] += delta[:, chosen]
        return x

    handles = bridged.dense_stream.add_edit(location, edit)
    try:
        yield bridged
    finally:
        for handle in handles:
            handle.remove()


def steering_place(bridged: Any, where: int | str, channel: int) -> tuple[int, torch.Tensor | None]:
    """The location that steering `where` acts at, and the channel's weights into the stream.

    Returns:
        The location, and `None` if the channel is one of the residual stream, else the weights
        `(d_model,)` by which it writes to it.

    Raises:
        ValueError: there is no such location, site or channel, or it does not write to the stream.
    """
    twin = bridged.sparse.config
    if not isinstance(where, str):
        _check_channel(f"location {where}", channel, twin.d_model)
        return bridged.check_location(where), None
    sites = bridged.sparse.node_sites()
    match = _SITE.fullmatch(where)
    if match is None or where not in sites:
        raise ValueError(
            f"There is no site {where!r} in the sparse twin; its sites are those of "
            f"node_sites(), h.0.attn.act_in to h.{twin.n_layer - 1}.mlp.resid_delta."
        )
    layer, part, name = int(match[1]), match[2], match[3]
    after = 2 * layer + (1 if part == "attn" else 2)
    if name in ("q", "k"):
        raise ValueError(
            f"{where} decides where attention looks and writes nothing to the residual stream, so "
            f"it has no counterpart in the dense one; steer h.{layer}.attn.act_in, .v or "
            ".resid_delta."
        )
    _check_channel(where, channel, sites[where].width)
    if name in ("v", "post_act"):
        module = bridged.sparse.get_submodule(f"transformer.h.{layer}.{part}.c_proj")
        return after, module.weight[:, channel].detach()
    # Channels past d_model are concatenated positions, which no bridge carries.
    _check_channel(where, channel, twin.d_model)
    return (after - 1 if name == "act_in" else after), None


def decoded_direction(
    bridged: Any, location: int, channel: int, write: torch.Tensor | None
) -> torch.Tensor:
    """What one unit of the channel is in the dense stream, `(dense width,)`."""
    bridge = bridged.bridges[location]
    if write is None:
        weight = bridge.decoder.weight
        write = torch.zeros(weight.shape[1], dtype=weight.dtype, device=weight.device)
        write[channel] = 1.0
    return bridge.decode_change(write).detach()


def _check_channel(where: str, channel: int, width: int) -> None:
    whole = isinstance(channel, int) and not isinstance(channel, bool)
    if not whole or not 0 <= channel < width:
        raise ValueError(
            f"There is no channel {channel!r} at {where}; its channels are 0 to {width - 1}."
        )
