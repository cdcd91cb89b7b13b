"""Learning which nodes matter: one mask parameter τ per node, trained by gradient (A.5).

The masks of several seeds are learned in one forward pass: each seed has its own rows of the batch.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..ablation import TOKENS, hooked_sites
from ..task_scores import TaskTensors, binary_loss, candidates, pair_logits, task_rows, trimmed
from .config import PruningConfig

Masks = dict[str, torch.Tensor]


class Gate(torch.autograd.Function):
    """Heaviside forward; the derivative of a sigmoid with a temperature backward."""

    @staticmethod
    def forward(ctx: Any, tau: torch.Tensor, temperature: float) -> torch.Tensor:
        ctx.save_for_backward(tau)
        ctx.temperature = temperature
        return (tau > 0).to(tau.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (tau,) = ctx.saved_tensors
        s = torch.sigmoid(tau / ctx.temperature)
        return grad * s * (1 - s) / ctx.temperature, None


def gate_hook(site: str, gates: Mapping[str, torch.Tensor], mean: torch.Tensor) -> Callable:
    """A forward hook that makes of each node `mean + gate * (output - mean)`.

    Args:
        site: a node site, or `TOKENS`.
        gates: site → `(seeds, width)`, `TOKENS` → `(seeds, vocab_size)`, read at every forward
            pass. The rows of a batch are those of the first seed, then as many of the second, …
        mean: `(width,)` of the site.
    """

    def hook(module, args, output):
        gate, center = gates[site].to(output), mean.to(output)
        by_seed = output.unflatten(0, (len(gate), -1))  # (seeds, rows, tokens, width)
        if site == TOKENS:
            ids = args[0].unflatten(0, (len(gate), -1))
            gate = torch.stack([g[i] for g, i in zip(gate, ids, strict=True)]).unsqueeze(-1)
        else:
            gate = gate[:, None, None, :]
        return (center + gate * (by_seed - center)).flatten(0, 1)

    return hook


def learn_masks(
    model: nn.Module,
    train: TaskTensors,
    means: Mapping[str, torch.Tensor],
    config: PruningConfig,
    seeds: Sequence[int],
    progress: bool = True,
) -> list[Masks]:
    """Train mask parameters, for every seed its own.

    Args:
        model: in eval mode; its weights are left as they are.
        train: the task's rows.
        means: site → `(width,)`; with `TOKENS` in it, token embeddings are nodes too.
        config: how to train, and how much memory that may take.
        seeds: of the initial noise and of the batches.
        progress: show a progress bar.

    Returns:
        For every seed: site → float32 `(width,)`, and `TOKENS` → `(vocab_size,)`, in [-1, 1].
    """
    fit = max(1, int(1e9 * config.memory_gb / _bytes_per_seed(model, train, means, config)))
    learned = []
    with tqdm(
        total=config.max_steps * len(seeds),
        desc="learning masks",
        disable=not progress,
        leave=False,
    ) as bar:
        for start in range(0, len(seeds), fit):
            learned += _learn_together(model, train, means, config, seeds[start : start + fit], bar)
    return learned


def _bytes_per_seed(
    model: nn.Module, train: TaskTensors, means: Mapping[str, torch.Tensor], config: PruningConfig
) -> float:
    """Roughly what autograd keeps of one seed's rows."""
    length = train["input_ids"].shape[1]
    heads = getattr(model.config, "num_attention_heads", 0) * model.config.num_hidden_layers
    # At a site: the linear layer's output, what AbsTopK leaves, the gate's product and a mask.
    per_token = 4 * sum(len(mean) for mean in means.values()) + 2 * heads * length
    return 4.0 * 2 * config.batch_size * length * per_token


def _learn_together(
    model: nn.Module,
    train: TaskTensors,
    means: Mapping[str, torch.Tensor],
    config: PruningConfig,
    seeds: Sequence[int],
    bar: tqdm,
) -> list[Masks]:
    device = next(model.parameters()).device
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    initial = [_initial(model, train, means, config, generator) for generator in generators]
    taus = {
        site: torch.stack([masks[site] for masks in initial]).to(device).requires_grad_()
        for site in means
    }
    parameters = list(taus.values())
    optimizer = torch.optim.AdamW(
        parameters,
        lr=config.learning_rate,
        betas=(0.9, config.adam_beta2),
        weight_decay=config.weight_decay,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 1 - step / max(1, config.max_steps)
    )
    gates: Masks = {}
    hooks = {site: gate_hook(site, gates, means[site]) for site in taus}
    weights_need_grad = [p for p in model.parameters() if p.requires_grad]
    n = len(train["target_ids"])
    try:
        for p in weights_need_grad:
            p.requires_grad_(False)
        with hooked_sites(model, hooks):
            for _ in range(config.max_steps):
                rows = torch.cat(
                    [torch.randint(n, (2 * config.batch_size,), generator=g) for g in generators]
                )
                batch = trimmed(task_rows(train, rows))
                for site, tau in taus.items():
                    gates[site] = Gate.apply(tau, config.temperature)
                pairs = pair_logits(model, batch).unflatten(0, (len(seeds), -1))
                # A sum over seeds: no seed's gradient depends on how many others there are.
                losses = binary_loss(pairs)
                open_nodes = sum(gate.sum(1) for gate in gates.values())
                optimizer.zero_grad()
                (losses + config.node_penalty * open_nodes).sum().backward()
                _clip_each_seed(parameters, config.max_grad_norm)
                optimizer.step()
                schedule.step()
                with torch.no_grad():
                    for tau in parameters:
                        tau.clamp_(-1, 1)
                bar.update(len(seeds))
                bar.set_postfix(
                    loss=f"{losses.mean().item():.3f}", nodes=int(open_nodes.mean()), refresh=False
                )
    finally:
        for p in weights_need_grad:
            p.requires_grad_(True)
    return [{site: tau[i].detach() for site, tau in taus.items()} for i in range(len(seeds))]


def _initial(
    model: nn.Module,
    train: TaskTensors,
    means: Mapping[str, torch.Tensor],
    config: PruningConfig,
    generator: torch.Generator,
) -> Masks:
    masks = {}
    for site, mean in means.items():
        width = model.get_input_embeddings().num_embeddings if site == TOKENS else len(mean)
        noise = config.init_std * torch.randn(width, generator=generator)
        masks[site] = (config.init_mean + noise).clamp(-1, 1)
        if site == TOKENS:
            # Tokens that never occur have no say: closed, and without a gradient they stay so.
            masks[site][~occurring_tokens(train, width)] = -1.0
    return masks


def occurring_tokens(tensors: TaskTensors, vocab_size: int) -> torch.Tensor:
    """Bool `(vocab_size,)`: tokens that stand in a prompt or are an answer."""
    occurs = torch.zeros(vocab_size, dtype=torch.bool)
    occurs[tensors["input_ids"][tensors["attention_mask"].bool()]] = True
    occurs[candidates(tensors)] = True
    return occurs


def _clip_each_seed(parameters: Sequence[torch.Tensor], max_norm: float) -> None:
    """As `clip_grad_norm_`, for every seed's rows by themselves."""
    norms = sum(p.grad.square().sum(1) for p in parameters).sqrt()
    factors = (max_norm / (norms + 1e-6)).clamp(max=1.0)
    for p in parameters:
        p.grad.mul_(factors[:, None])
