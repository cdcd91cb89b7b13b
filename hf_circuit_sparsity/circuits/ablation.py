"""Mean ablation: run a model with some of its nodes fixed at their average (METHOD section 2)."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn


def node_sites(model: nn.Module) -> dict[str, nn.Module]:
    """The model's node sites by name, or a clear error where a model has none."""
    sites = getattr(model, "node_sites", None)
    if sites is None:
        raise TypeError(
            f"{type(model).__name__} has no node_sites(), so there is nowhere to cut a circuit; "
            "pass a CircuitGPTForCausalLM."
        )
    return sites()


@contextmanager
def hooked_sites(model: nn.Module, hooks: Mapping[str, object]) -> Iterator[None]:
    """Attach forward hooks to node sites by name, and take them off again."""
    sites = node_sites(model)
    handles = []
    try:
        for name, hook in hooks.items():
            handles.append(sites[name].register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def mean_activations(
    model: nn.Module, input_ids: torch.Tensor, batch_size: int = 32
) -> dict[str, torch.Tensor]:
    """Average activation of every node over all tokens of `input_ids`.

    Args:
        model: has `node_sites()`.
        input_ids: `(n, length)` token ids, a sample of the pretraining distribution, unpadded.
        batch_size: sequences per forward pass.

    Returns:
        Site name → float32 `(width,)`.
    """
    sums: dict[str, torch.Tensor] = {}

    def adder(name: str):
        def hook(module, args, output):
            total = output.double().sum(dim=(0, 1))
            sums[name] = total if name not in sums else sums[name] + total

        return hook

    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    with hooked_sites(model, {name: adder(name) for name in node_sites(model)}):
        for batch in input_ids.split(batch_size):
            model(batch.to(device), use_cache=False, logits_to_keep=1)
    model.train(was_training)
    return {name: (total / input_ids.numel()).float() for name, total in sums.items()}


def ablation_hook(keep: torch.Tensor, mean: torch.Tensor):
    """A forward hook that lets the kept nodes through and fixes the others at their mean.

    Args:
        keep: bool `(width,)`.
        mean: `(width,)`.
    """

    def hook(module, args, output):
        return torch.where(
            keep.to(output.device), output, mean.to(device=output.device, dtype=output.dtype)
        )

    return hook


@contextmanager
def mean_ablated(
    model: nn.Module, keep: Mapping[str, torch.Tensor], means: Mapping[str, torch.Tensor]
) -> Iterator[None]:
    """Within the block, every node not marked in `keep` is fixed at its mean.

    Args:
        model: has `node_sites()`.
        keep: site → bool `(width,)`; sites that are not named run untouched.
        means: site → `(width,)`, from [`mean_activations`].
    """
    hooks = {name: ablation_hook(mask, means[name]) for name, mask in keep.items()}
    with hooked_sites(model, hooks):
        yield
