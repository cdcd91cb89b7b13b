"""Interventions on single nodes of a circuit: take them away, or give them another prompt's values.

The page shows the same: what the loss becomes without each node.
"""

from collections.abc import Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..tasks.binary_task import BinaryTask
from .ablation import (
    ablation_hook,
    at_the_answer,
    hooked_sites,
    in_eval_mode,
    recorded_sites,
    unwrapped,
)
from .node_set import Node, as_node, node_text
from .running import Running
from .task_scores import TaskTensors, all_pair_logits, binary_loss

if TYPE_CHECKING:
    import pandas


class Interventions(Running):
    """What can be done to a circuit's nodes while it runs."""

    @contextmanager
    def ablate(
        self, model: nn.Module, nodes: Collection[Node | str], *, alone: bool = True
    ) -> Iterator[nn.Module]:
        """Within the block the circuit runs alone, and these nodes are at their means too.

        Args:
            model: the one the circuit was cut out of.
            nodes: of the model.
            alone: if not, the whole model runs, with only these nodes ablated.

        Raises:
            ValueError: the circuit was made for another model, or that has no such node.
        """
        chosen = self._masks_of(nodes)
        hooks = {s: ablation_hook(~mask, self.means[s]) for s, mask in chosen.items()}
        with self._running(model, alone), hooked_sites(unwrapped(model), hooks):
            yield model

    @contextmanager
    def patch(
        self,
        model: nn.Module,
        nodes: Collection[Node | str],
        from_prompt: torch.Tensor,
        *,
        alone: bool = True,
    ) -> Iterator[nn.Module]:
        """Within the block these nodes are what they are on another prompt.

        Args:
            model: the one the circuit was cut out of.
            nodes: of the model.
            from_prompt: token ids `(n, length)`, as long as what runs in the block, and one row or
                as many; unpadded.
            alone: the circuit runs alone, on both prompts; if not, the whole model does.

        Raises:
            ValueError: the circuit was made for another model, or that has no such node.
        """
        chosen = self._masks_of(nodes)
        inner = unwrapped(model)
        ids = from_prompt.to(next(inner.parameters()).device)
        with self._running(model, alone):
            with torch.no_grad(), in_eval_mode(inner), recorded_sites(inner, chosen) as recorded:
                inner(input_ids=ids, use_cache=False, logits_to_keep=1)
            hooks = {s: ablation_hook(~mask, recorded[s]) for s, mask in chosen.items()}
            with hooked_sites(inner, hooks):
                yield model

    def node_effects(
        self, model: nn.Module, task: BinaryTask, *, prompts: int | None = None
    ) -> "pandas.DataFrame":
        """What each node is worth: by how much the circuit's loss on held-out prompts rises, in
        nats, when that node is at its mean too; the largest first.

        Args:
            model: the one the circuit was cut out of.
            task: the one it was found for.
            prompts: held-out prompts to measure on; all if not given.

        Returns:
            A table with the columns `node`, `site`, `index`, `name` and `effect`.

        Raises:
            ValueError: the circuit was made for another model.
        """
        import pandas

        test = task.tensors("test")
        rows = {name: tensor[:prompts] for name, tensor in test.items()}
        with in_eval_mode(unwrapped(model)):
            effects = node_effects(self, model, rows, self)
        table = [
            (node_text(node), *node, self.names.get(node_text(node), ""), effect)
            for node, effect in sorted(effects.items(), key=lambda item: -item[1])
        ]
        return pandas.DataFrame(table, columns=["node", "site", "index", "name", "effect"])

    def _running(self, model: nn.Module, alone: bool) -> AbstractContextManager:
        if alone:
            return self.apply(model)
        self.check_model(model)
        return nullcontext()

    def _masks_of(self, nodes: Collection[Node | str]) -> dict[str, torch.Tensor]:
        """Site → bool `(width,)`."""
        masks: dict[str, torch.Tensor] = {}
        for site, index in map(as_node, [nodes] if isinstance(nodes, str) else nodes):
            width = len(self.means.get(site, ()))
            if not 0 <= index < width:
                raise ValueError(
                    f"{site}.{index} was passed, but the model has {width} nodes at {site!r}."
                )
            masks.setdefault(site, torch.zeros(width, dtype=torch.bool))[index] = True
        return masks


def node_effects(
    circuit: Interventions, model: nn.Module, tensors: TaskTensors, nodes: Iterable[Node]
) -> dict[Node, float]:
    """By how much the circuit's task loss rises, in nats, when a node of it is mean-ablated too.

    Each node is ablated alone, the calibration stays the circuit's.

    Args:
        nodes: those of the circuit to measure; a progress bar may be wrapped around them.
    """
    effects = {}
    with circuit.apply(model, collapsed=True), at_the_answer(model):
        whole = binary_loss(all_pair_logits(model, tensors)).item()
        for site, index in nodes:
            mean = circuit.means[site]
            keep = torch.arange(len(mean)) != index
            with hooked_sites(model, {site: ablation_hook(keep, mean)}):
                effects[site, index] = binary_loss(all_pair_logits(model, tensors)).item() - whole
    return effects
