"""Bridges by ridge regression: a start for their training, and what it must be better than."""

import torch

from ..modeling import BridgedCausalLM


@torch.no_grad()
def ridge_bridges_(
    bridged: BridgedCausalLM,
    input_ids: torch.Tensor,
    penalty: float = 1e-3,
    batch_size: int = 32,
) -> BridgedCausalLM:
    """Set every encoder and decoder to the ridge regression between the two streams, in place.

    The AbsTopK behind an encoder is not part of the regression.

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
