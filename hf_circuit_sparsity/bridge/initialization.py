"""Where the training of bridges starts: standard units, and regression, which it must beat."""

import torch
from accelerate import Accelerator

from .modeling_bridge import BridgedCausalLM


@torch.no_grad()
def ridge_bridges_(
    bridged: BridgedCausalLM,
    input_ids: torch.Tensor,
    penalty: float = 1e-3,
    batch_size: int = 32,
) -> BridgedCausalLM:
    """Set every encoder and decoder to the ridge regression between the two streams, in place.

    The dense stream is standardized with what is measured here (see `Bridge`). The AbsTopK behind
    an encoder is not part of the regression.

    Args:
        bridged: with biases in its bridges.
        input_ids: `(n, T)`, unpadded; more tokens than either stream has channels.
        penalty: squared weights count so many times the mean second moment of the inputs.
        batch_size: sequences per forward pass.

    Raises:
        ValueError: the bridges have no biases, or there are too few tokens.
    """
    widths = bridged.dense.config.hidden_size, bridged.sparse.config.d_model
    if not bridged.config.bridge_bias:
        raise ValueError("The bridges have no biases, which the regression fits; make them with.")
    if input_ids.numel() <= max(widths):
        raise ValueError(
            f"input_ids has {input_ids.numel()} tokens, expected more than the {max(widths)} "
            "channels of a stream."
        )
    was_training = bridged.training
    bridged.eval()
    # Second moments of both streams with a constant beside them, summed over all tokens.
    moments = [torch.zeros(sum(widths) + 1, sum(widths) + 1, dtype=torch.float64)
               for _ in range(bridged.n_locations)]  # fmt: skip
    device = next(bridged.parameters()).device
    for batch in input_ids.split(batch_size):
        streams = []
        for stream in (bridged.dense_stream, bridged.sparse_stream):
            x, context = stream.embed(batch.to(device), None)
            streams.append(stream.run(x, context))
        for moment, *both in zip(moments, *streams, strict=True):
            both = [x.flatten(0, 1).double().cpu() for x in both]
            rows = torch.cat([*both, torch.ones(len(both[0]), 1, dtype=torch.float64)], dim=1)
            moment += rows.T @ rows
    dense = torch.arange(widths[0])
    sparse = widths[0] + torch.arange(widths[1])
    for bridge, moment in zip(bridged.bridges, moments, strict=True):
        moment /= input_ids.numel()
        mean = moment[-1, dense]
        bridge.set_units_(mean, moment.diagonal()[dense] - mean.square())
        to_units = torch.eye(len(moment), dtype=moment.dtype)
        to_units[-1, dense] = -bridge.dense_mean.cpu().double()
        to_units[:, dense] /= bridge.dense_scale.cpu().double()
        moment = to_units.T @ moment @ to_units
        for linear, source, target in (
            (bridge.encoder, dense, sparse),
            (bridge.decoder, sparse, dense),
        ):
            source = torch.cat([source, torch.tensor([sum(widths)])])
            gram = moment[source][:, source]
            strength = penalty * gram.diagonal()[:-1].mean()
            gram += strength * torch.diag(torch.ones(len(gram), dtype=gram.dtype))
            gram[-1, -1] -= strength  # the bias is not penalized
            solution = torch.linalg.solve(gram, moment[source][:, target])
            linear.weight.copy_(solution[:-1].T)
            linear.bias.copy_(solution[-1])
    return bridged.train(was_training)


@torch.no_grad()
def standardize_bridges_(
    bridged: BridgedCausalLM,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    accelerator: Accelerator | None = None,
) -> BridgedCausalLM:
    """Let every bridge read and write the dense stream in standard units, in place; see `Bridge`.

    The weights stay, so that fresh bridges begin at the size of the stream, whatever it is.

    Args:
        bridged: its dense model is run once.
        input_ids: `(B, T)`, a thousand tokens or more.
        attention_mask: `(B, T)`, 0 for padding, which does not count.
        accelerator: with several processes, each of which measures its own tokens, takes the mean
            over all of them, so that the units are everywhere the same.
    """
    stream = bridged.dense_stream
    x, context = stream.embed(input_ids, attention_mask)
    real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    for bridge, found in zip(bridged.bridges, stream.run(x, context), strict=True):
        x = found[real.bool()].double()
        moments = torch.stack([x.mean(0), x.square().mean(0)])
        if accelerator is not None:
            moments = accelerator.reduce(moments, "mean")
        mean, square = moments
        bridge.set_units_(mean, square - mean.square())
    return bridged
