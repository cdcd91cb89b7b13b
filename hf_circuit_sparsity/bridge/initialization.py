"""Where the training of bridges starts: standardization, and the ridge regression it must beat."""

import torch
from accelerate import Accelerator

from ..circuits.ablation import in_eval_mode
from .modeling_bridge import BridgedCausalLM


@torch.no_grad()
def ridge_bridges_(
    bridged: BridgedCausalLM,
    input_ids: torch.Tensor,
    penalty: float = 1e-3,
    batch_size: int = 32,
) -> BridgedCausalLM:
    """Set every encoder and decoder to the ridge regression between the two streams, in place.

    The dense stream is standardized by what is measured here (see [`Bridge`]). The AbsTopK behind
    an encoder is not part of the regression.

    Args:
        bridged: its bridges have biases.
        input_ids: `(n, T)`, unpadded; more tokens than either stream has channels.
        penalty: of squared weights, as a multiple of the mean second moment of the inputs.
        batch_size: sequences per forward pass.

    Raises:
        ValueError: the bridges have no biases, or there are too few tokens.
    """
    widths = bridged.dense.config.hidden_size, bridged.sparse.config.d_model
    if not bridged.config.bridge_bias:
        raise ValueError(
            "The bridges have no biases, but the regression fits them; pass bridge_bias=True to "
            "from_models."
        )
    if input_ids.numel() <= max(widths):
        raise ValueError(
            f"input_ids has {input_ids.numel()} tokens, expected more than the {max(widths)} "
            "channels of a stream."
        )
    # Second moments of both streams with a constant beside them, summed over all tokens.
    size = sum(widths) + 1
    moments = [torch.zeros(size, size, dtype=torch.float64) for _ in bridged.bridges]
    device = next(bridged.parameters()).device
    with in_eval_mode(bridged):
        for batch in input_ids.split(batch_size):
            streams = (bridged.dense_stream, bridged.sparse_stream)
            runs = [stream.run(*stream.embed(batch.to(device), None)) for stream in streams]
            for moment, *both in zip(moments, *runs, strict=True):
                columns = [x.flatten(0, 1).double().cpu() for x in both]
                rows = torch.cat([*columns, torch.ones(batch.numel(), 1)], dim=1)
                moment += rows.T @ rows
    dense = torch.arange(widths[0])
    sparse = widths[0] + torch.arange(widths[1])
    for bridge, moment in zip(bridged.bridges, moments, strict=True):
        moment /= input_ids.numel()
        mean = moment[-1, dense]
        bridge.standardize_(mean, moment.diagonal()[dense] - mean.square())
        standardize = torch.eye(size, dtype=moment.dtype)
        standardize[-1, dense] = -bridge.dense_mean.cpu().double()
        standardize[:, dense] /= bridge.dense_scale.cpu().double()
        moment = standardize.T @ moment @ standardize
        ends = (bridge.encoder, dense, sparse), (bridge.decoder, sparse, dense)
        for linear, source, target in ends:
            source = torch.cat([source, torch.tensor([size - 1])])
            gram = moment[source][:, source]
            strength = penalty * gram.diagonal()[:-1].mean()
            gram.diagonal()[:-1] += strength  # the bias is not penalized
            solution = torch.linalg.solve(gram, moment[source][:, target])
            linear.weight.copy_(solution[:-1].T)
            linear.bias.copy_(solution[-1])
    return bridged


@torch.no_grad()
def standardize_bridges_(
    bridged: BridgedCausalLM,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    accelerator: Accelerator | None = None,
) -> BridgedCausalLM:
    """Let every bridge read and write the dense stream standardized, in place; see [`Bridge`].

    The weights stay, so fresh bridges start at the size of the stream, whatever that is.

    Args:
        bridged: its dense model is run once.
        input_ids: `(B, T)`, a thousand tokens or more.
        attention_mask: `(B, T)`, 0 for padding, which does not count.
        accelerator: of several processes, each of which measures its own tokens; the mean over all
            of them is used everywhere.
    """
    stream = bridged.dense_stream
    run = stream.run(*stream.embed(input_ids, attention_mask))
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    for bridge, location in zip(bridged.bridges, run, strict=True):
        tokens = location[mask.bool()].double()
        moments = torch.stack([tokens.mean(0), tokens.square().mean(0)])
        if accelerator is not None:
            moments = accelerator.reduce(moments, "mean")
        mean, square = moments
        bridge.standardize_(mean, square - mean.square())
    return bridged
