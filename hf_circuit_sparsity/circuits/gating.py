"""A model with gates on its nodes: what is shut is ablated, what is open runs.

How one ablates decides what a circuit looks like (Miller et al. 2024, arXiv 2407.08734): at the
mean, at zero, or at what the node is in the counterfactual prompt; with norms that rescale what is
left, or with norms as they are in the whole model.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..kernels.cpu import compiled_kernels
from .ablation import TOKENS, at_the_answer, hooked, hooked_sites, recorded_sites
from .collapse import Collapse
from .task_scores import TaskTensors, next_token_logits, pair_logits

Gates = dict[str, Tensor]
"""Site → `(k, width)`, `TOKENS` → `(k, vocabulary)`; float, or bool where nothing is learned. The
rows of a batch are those of the first gates, then as many of the second, …"""


class Prepared(NamedTuple):
    """What is measured once on the whole model for some rows."""

    centers: Mapping[str, Tensor]
    """Site → what a shut node is: `(width,)`, or `(rows, tokens, width)`."""
    norms: Mapping[nn.Module, Tensor]
    """Norm → what it divides by, `(rows, tokens, …, 1)`; empty where norms are not frozen."""


@dataclass(frozen=True)
class GatedModel:
    """Runs a model with gates.

    Attributes:
        model: in eval mode.
        means: site → `(width,)`, and `TOKENS` where tokens are gated.
        resample: shut nodes are what they are in the counterfactual prompt, which must be as long.
        freeze_norms: every norm divides by what it divides by in the whole model.
    """

    model: nn.Module
    means: Mapping[str, Tensor]
    resample: bool = False
    freeze_norms: bool = False

    @torch.no_grad()
    def prepare(self, rows: TaskTensors) -> Prepared:
        """Measure what [`run`] needs to know of the whole model; nothing for plain means."""
        centers, norms = dict(self.means), {}
        if self.freeze_norms:
            with hooked([(norm, _remember(norms)) for norm in norms_of(self.model)]):
                pair_logits(self.model, rows)
        if self.resample:
            centers |= self.counterfactual(rows)
        return Prepared(centers, norms)

    @torch.no_grad()
    def counterfactual(self, rows: TaskTensors) -> dict[str, Tensor]:
        """Site → what its nodes are in the counterfactual prompts, `(rows, tokens, width)`."""
        others = {name: rows[f"counterfactual_{name}"] for name in ("input_ids", "attention_mask")}
        with recorded_sites(self.model, [s for s in self.means if s != TOKENS]) as recorded:
            next_token_logits(self.model, others)
        return recorded

    def run(
        self,
        rows: TaskTensors,
        gates: Gates,
        prepared: Prepared | None = None,
        copies: int = 1,
        logits: Callable[[nn.Module, TaskTensors], Tensor] = pair_logits,
        collapse: Collapse | None = None,
    ) -> Tensor:
        """Logits of the answers, `(copies * rows, 2)`.

        Args:
            rows: of a task, left-padded.
            gates: as many rows of gates as divide the rows of the batch.
            prepared: of these rows, where it is known already.
            copies: how often the rows are repeated.
            logits: [`next_token_logits`] for the whole vocabulary.
            collapse: to nodes among which all that are open are, where the others are at `means`.
        """
        prepared = prepared or self.prepare(rows)
        frozen = [(norm, _freeze(_repeated(size, copies))) for norm, size in prepared.norms.items()]
        # Norms first: a node site may be a norm's output.
        # What was prepared is of the whole model; only the gated one is collapsed.
        with hooked(frozen), collapse.running() if collapse else nullcontext():
            return self._gated(rows, gates, prepared.centers, {}, copies, logits)

    def interchanged(
        self,
        rows: TaskTensors,
        gates: Gates,
        swapped: Mapping[str, Tensor],
        theirs: Mapping[str, Tensor],
        alone: bool,
        copies: int = 1,
    ) -> Tensor:
        """Logits of the answers, `(copies * rows, 2)`, with open nodes swapped.

        Args:
            rows: of a task, left-padded.
            gates: as for [`run`].
            swapped: site → bool `(width,)`, which nodes are, where they are open, what they are in
                the counterfactual prompt.
            theirs: site → what nodes are there, `(rows, tokens, width)`.
            alone: shut nodes are ablated; if not, all else is the whole model, untouched.
            copies: how often the rows are repeated.
        """
        if alone:
            given = {site: (nodes, theirs[site]) for site, nodes in swapped.items()}
            return self._gated(rows, gates, self.means, given, copies, pair_logits)
        taken = {site: gates[site] * nodes.to(gates[site]) for site, nodes in swapped.items()}
        rest = {s: ~gate if gate.dtype is torch.bool else 1 - gate for s, gate in taken.items()}
        return self._gated(rows, rest, theirs, {}, copies, pair_logits)

    def _gated(
        self,
        rows: TaskTensors,
        gates: Gates,
        centers: Mapping[str, Tensor],
        given: Mapping[str, tuple[Tensor, Tensor]],
        copies: int,
        logits: Callable[[nn.Module, TaskTensors], Tensor],
    ) -> Tensor:
        repeated = {name: torch.cat([tensor] * copies) for name, tensor in rows.items()}
        hooks = {}
        for site in gates:
            hooks[site] = gate_hook(site, gates, _repeated(centers[site], copies))
            if site in given:
                nodes, values = given[site]
                hooks[site] = _given(nodes, _repeated(values, copies), hooks[site])
        # What was measured of every position has to find every position.
        by_position = given or any(center.dim() > 1 for center in centers.values())
        everywhere = by_position or self.freeze_norms
        fewer = nullcontext() if everywhere else at_the_answer(self.model)
        with hooked_sites(self.model, hooks), fewer:
            return logits(self.model, repeated)


def _given(nodes: Tensor, values: Tensor, then: Callable) -> Callable:
    """A forward hook that puts values in the place of some nodes before another hook runs."""

    def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return then(module, args, torch.where(nodes.to(output.device), values.to(output), output))

    return hook


def gate_hook(site: str, gates: Mapping[str, Tensor], center: Tensor) -> Callable:
    """A forward hook that makes of each node `center + gate * (output - center)`.

    Args:
        site: a node site, or `TOKENS`.
        gates: see [`Gates`]; read at every forward pass.
        center: `(width,)` of the site, or `(rows, tokens, width)`.
    """

    def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        gate, mean = gates[site].to(output.device), center.to(output)
        learned = site != TOKENS and mean.dim() == 1 and gate.dtype is not torch.bool
        if learned and (kernels := compiled_kernels(output, gate, mean)):
            by_gate = output.reshape(len(gate), -1, output.shape[-1])
            return kernels.differentiable_gates(by_gate, gate, mean).view(output.shape)
        by_row = output.unflatten(0, (len(gate), -1))  # (k, rows, tokens, width)
        mean = mean.unflatten(0, (len(gate), -1)) if mean.dim() > 1 else mean
        if site == TOKENS:
            ids = args[0].unflatten(0, (len(gate), -1))
            gate = torch.stack([g[i] for g, i in zip(gate, ids, strict=True)]).unsqueeze(-1)
        else:
            gate = gate[:, None, None, :]
        if gate.dtype is torch.bool:
            return torch.where(gate, by_row, mean).flatten(0, 1)
        gate = gate.to(output)
        return torch.addcmul(mean * (1 - gate), gate, by_row).flatten(0, 1)  # in one pass

    return hook


def norms_of(model: nn.Module) -> list[nn.Module]:
    """Every norm of a model: what has "norm" in the name of its class."""
    return [module for module in model.modules() if "norm" in type(module).__name__.lower()]


def norm_size(norm: nn.Module, x: Tensor) -> Tensor:
    """What a norm divides by, `(..., 1)`: standard deviation, or root of the mean square."""
    eps = getattr(norm, "eps", None) or getattr(norm, "variance_epsilon", None) or 1e-6
    x = x.float()
    if isinstance(norm, nn.LayerNorm):
        x = x - x.mean(-1, keepdim=True)
    return (x.square().mean(-1, keepdim=True) + eps).sqrt()


def _remember(sizes: dict[nn.Module, Tensor]) -> Callable:
    def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
        sizes[module] = norm_size(module, args[0])

    return hook


def _freeze(size: Tensor) -> Callable:
    def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        bias = getattr(module, "bias", None)
        bias = 0.0 if bias is None else bias
        ratio = (norm_size(module, args[0]) / size).to(output.dtype)
        return bias + (output - bias) * ratio

    return hook


def _repeated(tensor: Tensor, copies: int) -> Tensor:
    return tensor if tensor.dim() == 1 or copies == 1 else torch.cat([tensor] * copies)


@contextmanager
def frozen_weights(model: nn.Module) -> Iterator[None]:
    """Within the block no weight takes a gradient."""
    weights = [p for p in model.parameters() if p.requires_grad]
    try:
        for p in weights:
            p.requires_grad_(False)
        yield
    finally:
        for p in weights:
            p.requires_grad_(True)
