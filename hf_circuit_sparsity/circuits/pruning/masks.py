"""Learning which nodes matter: one mask parameter τ per node, trained by gradient (A.5).

The masks of several seeds are learned in one forward pass: each seed has its own rows of the batch.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..ablation import TOKENS
from ..gating import GatedModel, Gates, Prepared, frozen_weights
from ..interchange import Swaps, interchange_loss
from ..supersets import ascend, beside, random_superset
from ..task_scores import (
    TaskTensors,
    binary_loss,
    candidates,
    next_token_logits,
    task_rows,
    trimmed,
)
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


def learn_masks(
    model: nn.Module,
    train: TaskTensors,
    means: Mapping[str, torch.Tensor],
    config: PruningConfig,
    seeds: Sequence[int],
    progress: bool = True,
    allowed: Masks | None = None,
) -> list[Masks]:
    """Train mask parameters, for every seed its own.

    Args:
        model: in eval mode; its weights are left as they are.
        train: the task's rows.
        means: site → `(width,)`; with `TOKENS` in it, token embeddings are nodes too.
        config: how to train, and how much memory that may take.
        seeds: of the initial noise and of the batches.
        progress: show a progress bar.
        allowed: site → bool `(width,)`, nodes that may be open; all if not given.

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
            learned += _learn_together(
                model, train, means, config, seeds[start : start + fit], bar, allowed
            )
    return learned


def _bytes_per_seed(
    model: nn.Module, train: TaskTensors, means: Mapping[str, torch.Tensor], config: PruningConfig
) -> float:
    """Roughly what autograd keeps of one seed's rows."""
    length = train["input_ids"].shape[1]
    heads = getattr(model.config, "num_attention_heads", 0) * model.config.num_hidden_layers
    # At a site: the linear layer's output, what AbsTopK leaves, the gate's product and a mask.
    per_token = 4 * sum(len(mean) for mean in means.values()) + 2 * heads * length
    copies = 1 if config.outside == "off" else 2
    return 4.0 * 2 * copies * config.batch_size * length * per_token


def gated_model(model: nn.Module, means: Masks, config: PruningConfig) -> GatedModel:
    """The model with gates, ablated as a configuration says."""
    return GatedModel(model, means, config.ablation == "resample", config.freeze_norms)


def _learn_together(
    model: nn.Module,
    train: TaskTensors,
    means: Mapping[str, torch.Tensor],
    config: PruningConfig,
    seeds: Sequence[int],
    bar: tqdm,
    allowed: Masks | None,
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
    gated, n = gated_model(model, means, config), len(train["target_ids"])
    rest = _Outside(gated, config, generators)
    # The same for all seeds, so that none depends on how many others there are.
    generator = torch.Generator().manual_seed(config.seed)
    swaps = Swaps({s: tau.shape[1] for s, tau in taus.items()}, generator)
    with frozen_weights(model):
        for step in range(config.max_steps):
            rows = torch.cat(
                [torch.randint(n, (2 * config.batch_size,), generator=g) for g in generators]
            )
            batch = trimmed(task_rows(train, rows))
            prepared = gated.prepare(batch)
            gates = {s: Gate.apply(tau, config.temperature) for s, tau in taus.items()}
            for site, mask in (allowed or {}).items():
                gates[site] = gates[site] * mask.to(gates[site])
            both = rest.beside(gates, batch, prepared, step)
            # A sum over seeds: no seed's gradient depends on how many others there are.
            losses = _losses(gated, batch, both, prepared, config)
            losses = losses.unflatten(0, (-1, len(seeds))).mean(0)
            if config.interchange:
                far = interchange_loss(gated, batch, gates, swaps.draw())
                losses = losses + config.interchange * far
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
    return [{site: tau[i].detach() for site, tau in taus.items()} for i in range(len(seeds))]


def _losses(
    gated: GatedModel, rows: TaskTensors, gates: Gates, prepared: Prepared, config: PruningConfig
) -> torch.Tensor:
    """What masks minimize, of every row of gates."""
    count = len(next(iter(gates.values())))
    copies = count * 2 * config.batch_size // len(rows["target_ids"])
    if config.objective == "candidates":
        return binary_loss(gated.run(rows, gates, prepared, copies).unflatten(0, (count, -1)))
    logits = gated.run(rows, gates, prepared, copies, next_token_logits).log_softmax(-1)
    with torch.no_grad():
        whole = torch.cat([next_token_logits(gated.model, rows).log_softmax(-1)] * copies)
    divergence = (whole.exp() * (whole - logits)).sum(-1)
    return divergence.unflatten(0, (count, -1)).mean(-1)


class _Outside:
    """What stays on beside each seed's circuit while its masks are learned."""

    def __init__(
        self, gated: GatedModel, config: PruningConfig, generators: Sequence[torch.Generator]
    ):
        self.gated, self.config, self.generators = gated, config, generators
        self.chosen: Gates = {}

    def beside(self, gates: Gates, rows: TaskTensors, prepared: Prepared, step: int) -> Gates:
        """The gates of all circuits alone, then those of all circuits with what is on."""
        config = self.config
        if config.outside == "off":
            return gates
        restart = config.adversary_restart
        if config.outside == "random" or not self.chosen or (restart and step % restart == 0):
            self.chosen = self._drawn(gates)
        if config.outside == "adversarial":
            self.chosen = ascend(
                self.gated, rows, gates, self.chosen,
                lambda pairs: binary_loss(pairs.unflatten(0, (len(self.generators), -1))),
                config.adversary_steps, config.adversary_rate, prepared,
                config.adversary_nodes or None,
            )  # fmt: skip
        both = beside(gates, self.chosen)
        return {site: torch.cat([gate, both[site]]) for site, gate in gates.items()}

    def _drawn(self, gates: Gates) -> Gates:
        widths = {site: gate.shape[1] for site, gate in gates.items()}
        drawn = [random_superset(widths, generator) for generator in self.generators]
        return {
            site: torch.stack([masks[site] for masks in drawn]).to(gate)
            for site, gate in gates.items()
        }


def _initial(
    model: nn.Module,
    train: TaskTensors,
    means: Mapping[str, torch.Tensor],
    config: PruningConfig,
    generator: torch.Generator,
) -> Masks:
    masks = {}
    for site, mean in means.items():
        nodes = width(model, site, mean)
        noise = config.init_std * torch.randn(nodes, generator=generator)
        masks[site] = (config.init_mean + noise).clamp(-1, 1)
        if site == TOKENS:
            # Tokens that never occur have no say: closed, and without a gradient they stay so.
            masks[site][~occurring_tokens(train, nodes)] = -1.0
    return masks


def width(model: nn.Module, site: str, mean: torch.Tensor) -> int:
    """How many nodes a site has, of which that is the mean; of `TOKENS`, the vocabulary."""
    return model.get_input_embeddings().num_embeddings if site == TOKENS else len(mean)


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
