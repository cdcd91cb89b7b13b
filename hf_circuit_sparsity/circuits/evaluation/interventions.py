"""A circuit under other interventions than the one it was found with.

Its nodes are swapped from the counterfactual prompt into the otherwise untouched model (Geiger et
al. 2021, arXiv 2106.02997), or everything else is ablated otherwise: every number about a circuit
depends on how one ablates (Miller et al. 2024, arXiv 2407.08734).
"""

import torch
from torch import nn

from ...tasks.binary_task import BinaryTask
from ..ablation import TOKENS, ablation_hook, hooked, hooked_sites, recorded_sites, task_means
from ..circuit import Circuit
from ..gating import GatedModel
from ..task_scores import (
    Calibration,
    TaskTensors,
    all_pair_logits,
    binary_accuracy,
    binary_loss,
    pair_logits,
    task_rows,
    trimmed,
)

BATCH_SIZE = 128
Swaps = tuple[TaskTensors, TaskTensors]
"""Prompts and their counterfactuals, row by row, equally long."""


def equally_long(task: BinaryTask, count: int) -> Swaps | None:
    """At most `count` held-out prompts with their counterfactuals; None if none are as long."""
    tensors = task.tensors("test")
    lengths = tensors["attention_mask"].sum(1)
    other = torch.arange(len(lengths)) ^ 1  # rows 2k and 2k+1 are a pair
    rows = (lengths == lengths[other]).nonzero()[:, 0][:count]
    if not len(rows):
        return None
    return task_rows(tensors, rows), task_rows(tensors, other[rows])


class Interchange:
    """What a circuit's nodes do to the whole model when they alone see the other prompt.

    Args:
        model: in eval mode; everything outside the circuit sees its own prompt, and answers to
            what the circuit's nodes are.
        swaps: prompts and counterfactuals.
        calibration: of the whole model.
    """

    def __init__(self, model: nn.Module, swaps: Swaps, calibration: Calibration):
        self.model, self.swaps, self.calibration = model, swaps, calibration
        self.answers = [calibration.pairs(all_pair_logits(model, side), side) for side in swaps]

    @torch.no_grad()
    def measure(
        self, circuit: Circuit, by_layer: bool = False, few: bool = False
    ) -> dict[str, float]:
        """Swap the nodes of a circuit, and, `by_layer`, those of one layer at a time.

        Args:
            circuit: its nodes are swapped.
            by_layer: layer by layer too, and that within the circuit alone as well.
            few: on one batch of prompts only.

        Returns:
            `interchange`: share of prompts that get the other answer. `logit difference moved`: of
            the way from the model's difference between the candidates to its difference on the
            other prompt, the share that the circuit's nodes move it, mean over prompts over mean;
            1 is all of it. The same by layer, as `moved by layer: h.0`, and as `moved by layer,
            alone: h.0` of the way of the circuit while it runs alone.
        """
        layers: dict[str, list[str]] = {}
        for site in circuit.nodes if by_layer else ():
            layers.setdefault(".".join(site.split(".")[:2]), []).append(site)
        swapped = self._swapped(circuit, {"": list(circuit.nodes), **layers}, few)
        moved = self._moved(swapped, self.answers)
        numbers = {
            "interchange": binary_accuracy(swapped[""].flip(1)),
            "logit difference moved": moved.pop(""),
            **{f"moved by layer: {layer}": share for layer, share in moved.items()},
        }
        if by_layer:
            with circuit.apply(self.model, calibrated=False):
                alone = [
                    self.calibration.pairs(all_pair_logits(self.model, rows), rows)
                    for rows in (task_rows(side, slice(BATCH_SIZE)) for side in self.swaps)
                ]
                moved = self._moved(self._swapped(circuit, layers, few=True), alone)
            numbers |= {f"moved by layer, alone: {layer}": s for layer, s in moved.items()}
        return numbers

    def _swapped(
        self, circuit: Circuit, parts: dict[str, list[str]], few: bool
    ) -> dict[str, torch.Tensor]:
        """Part → logits `(n, 2)` with the circuit's nodes at its sites from the counterfactual."""
        model, masks = self.model, circuit.masks()
        swapped: dict[str, list[torch.Tensor]] = {part: [] for part in parts}
        batches = torch.arange(len(self.swaps[0]["target_ids"])).split(BATCH_SIZE)
        for rows in batches[: 1 if few else None]:
            base, source = (trimmed(task_rows(side, rows)) for side in self.swaps)
            with recorded_sites(model, circuit.nodes) as activations:
                pair_logits(model, source)
            swap = {s: ablation_hook(~masks[s], theirs) for s, theirs in activations.items()}
            for part, sites in parts.items():
                with hooked_sites(model, {site: swap[site] for site in sites}):
                    pairs = pair_logits(model, base).cpu()
                swapped[part].append(self.calibration.pairs(pairs, base))
        return {part: torch.cat(pairs) for part, pairs in swapped.items()}

    @staticmethod
    def _moved(swapped: dict[str, torch.Tensor], answers: list[torch.Tensor]) -> dict[str, float]:
        """Of the way from the answers to the prompts to those to their counterfactuals; where
        that is less than a hundredth of a nat there is nothing to be moved."""
        shares = {}
        for part, pairs in swapped.items():
            # Each is that of the right answer to its own prompt.
            base, source = (_difference(side[: len(pairs)]) for side in answers)
            way = base + source
            shares[part] = (base - _difference(pairs)) / way if abs(way) > 0.01 else 0.0
        return shares


def _difference(pairs: torch.Tensor) -> float:
    return (pairs[:, 0] - pairs[:, 1]).mean().item()


class OtherAblations:
    """The circuit alone, with everything else ablated in other ways than at the reference mean.

    Args:
        model: in eval mode.
        seen: training prompts, for the task's own means.
        test: held-out prompts.
        swaps: of those whose counterfactual is as long, if there are any.
    """

    def __init__(self, model: nn.Module, seen: TaskTensors, test: TaskTensors, swaps: Swaps | None):
        self.model, self.test, self.swaps = model, test, swaps
        means = task_means(model, seen)
        self.task_means = {**means.nodes, TOKENS: means.token}

    def losses(
        self, circuit: Circuit, calibration: Calibration, few: bool = False
    ) -> dict[str, float]:
        """Loss in nats, by name of the ablation; with edges cut as the circuit has them. `few`
        measures on one batch of prompts only."""
        keep, means = circuit.masks_and_means(self.model)
        of_task = {site: self.task_means[site] for site in keep}
        nothing = {site: torch.zeros_like(mean) for site, mean in means.items()}
        ways = {
            "task-mean ablation": (GatedModel(self.model, of_task), self.test),
            "zero ablation": (GatedModel(self.model, nothing), self.test),
            "frozen norms": (GatedModel(self.model, means, freeze_norms=True), self.test),
        }
        if self.swaps is not None:
            base, source = self.swaps
            others = {f"counterfactual_{k}": source[k] for k in ("input_ids", "attention_mask")}
            resampled = GatedModel(self.model, means, resample=True)
            ways["resample ablation"] = (resampled, {**base, **others})
        hooks = circuit.edge_cuts(self.model)
        gates = {site: mask[None] for site, mask in keep.items()}
        losses = {}
        for name, (gated, tensors) in ways.items():
            pairs = []
            batches = torch.arange(len(tensors["target_ids"])).split(BATCH_SIZE)
            for index in batches[: 1 if few else None]:
                rows = trimmed(task_rows(tensors, index))
                prepared = gated.prepare(rows)  # of the whole model, before edges are cut
                with torch.no_grad(), hooked(hooks):
                    pairs.append(gated.run(rows, gates, prepared).cpu())
            measured = torch.cat(pairs)
            rows = task_rows(tensors, slice(len(measured)))
            losses[name] = binary_loss(calibration.pairs(measured, rows)).item()
        return losses
