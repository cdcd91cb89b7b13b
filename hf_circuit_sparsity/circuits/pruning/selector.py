"""Candidate circuits, measured: what each loses, and which of its nodes or edges can go."""

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from tqdm.auto import trange

from ..ablation import TOKENS, ReferenceMeans, hooked
from ..collapse import Collapse
from ..edges import Edge, cut_offsets, edge_hooks
from ..gating import Gates
from ..interchange import Swaps, interchange_loss
from ..supersets import adversarial_superset, random_superset
from ..task_scores import (
    Calibration,
    TaskTensors,
    all_pair_logits,
    binary_loss,
    task_rows,
    trimmed,
)
from .config import PruningConfig
from .masks import Masks, gated_model

# What looks this many times worse than the target on a few prompts is not tried on all of them.
_HOPELESS = 2.0
# So many supersets that broke a candidate are tried on the next one before the adversary looks for
# another.
_REMEMBERED = 8
# So many of these when candidates are only put in order.
_GLANCED_AT = 2
# Rows of a forward pass, roughly; of small models more, up to so many numbers in a hidden state, so
# that many circuits are measured in one pass.
_ROWS, _HIDDEN_STATE = 256, 2**18
# Of models that are narrower all else takes so long that collapsing them saves nothing.
_WIDE = 128
# Where so many of the cheapest cannot go, others are not tried: large circuits would take hours.
_PATIENCE = 64
# Circuits that are listed at once.
_AT_ONCE = 64


class Selector:
    """Measures candidate circuits: their loss, calibrated as the whole model is, on training rows.

    With `config.outside` it is the largest of that of the circuit alone and that beside parts of
    the rest: the mean over random parts, or the worst that an adversary found. With
    `config.interchange` it is at least the distance from the whole model while nodes are swapped.

    Args:
        model: in eval mode.
        selection: training rows.
        means: of what is ablated; its `token` is used where masks name `TOKENS`.
        calibration: the whole model's.
        config: how.
    """

    def __init__(
        self, model: nn.Module, selection: TaskTensors, means: ReferenceMeans,
        calibration: Calibration, config: PruningConfig,
    ):  # fmt: skip
        self.model, self.means = model, means
        self.gated = gated_model(model, {**means.nodes, TOKENS: means.token}, config)
        self.calibration, self.config = calibration, config
        self.target = config.target_loss * config.selection_margin
        self._all = selection
        few = config.screen_prompts
        fewer = 0 < few < len(selection["target_ids"])
        self._few = task_rows(selection, slice(few)) if fewer else None
        self._generator = torch.Generator().manual_seed(config.seed)
        self._outside: list[Masks] = []
        self._collapse: Collapse | None = None
        widths = {site: len(mean) for site, mean in means.nodes.items()}
        generator = torch.Generator().manual_seed(config.seed)
        self._swaps = Swaps(widths, generator).spread(config.interchange_depths)

    def loss(self, keep: Masks, cut: Sequence[Edge] = (), few: bool = False) -> float:
        """Loss of the model cut down to the kept nodes, without the cut edges."""
        hooks = edge_hooks(self.model, cut, cut_offsets(cut, self.means)) if cut else []
        with hooked(hooks):
            loss = self._running([keep], few)
        return self._and_swapped([keep], loss, few)[0]

    def losses(
        self, candidates: Sequence[tuple[Masks, Sequence[Edge]]], few: bool = False
    ) -> list[float]:
        """[`Selector.loss`] of each; circuits without cut edges share forward passes."""
        if any(cut for _, cut in candidates):
            return [self.loss(keep, cut, few) for keep, cut in candidates]
        keeps = [keep for keep, _ in candidates]
        return self._and_swapped(keeps, self._running(keeps, few), few)

    def _rows(self, few: bool) -> TaskTensors:
        return self._few if few and self._few is not None else self._all

    def _running(self, keeps: Sequence[Masks], few: bool) -> list[float]:
        """Of circuits that run, alone and beside what else is asked for."""
        rows = self._rows(few)
        alone = self._losses(_stacked(keeps), rows)
        if self.config.outside == "off":
            return alone
        hopeless = _HOPELESS * self.target
        return [
            loss if loss > hopeless else max(loss, self._beside(keep, rows, search=not few))
            for keep, loss in zip(keeps, alone, strict=True)
        ]

    def _and_swapped(
        self, keeps: Sequence[Masks], losses: Sequence[float], few: bool
    ) -> list[float]:
        """The losses, or the distances while nodes are swapped where these are asked for and more;
        they are not measured of what is hopeless already."""
        losses = list(losses)
        left = [i for i, loss in enumerate(losses) if loss <= _HOPELESS * self.target]
        if self.config.interchange and left:
            far = self._distances(_stacked([keeps[i] for i in left]), self._rows(few))
            for i, distance in zip(left, far, strict=True):
                losses[i] = max(losses[i], distance)
        return losses

    @torch.no_grad()
    def _distances(self, gates: Gates, rows: TaskTensors) -> list[float]:
        """By the worst swap, of every row of gates; without edge cuts, which the whole model does
        not know."""
        far = torch.zeros(len(self._swaps), _rows_of(gates))
        n = len(rows["target_ids"])
        for ids in torch.arange(n).split(self._room(rows)):
            part = trimmed(task_rows(rows, ids))
            theirs = self.gated.counterfactual(part)
            fit = max(1, self._room(part) // len(ids))
            for at, swapped in enumerate(self._swaps):
                distances = [
                    interchange_loss(
                        self.gated, part, some, swapped, theirs, _rows_of(some), self.calibration
                    )
                    for some in _parts(gates, fit)
                ]
                far[at] += torch.cat(distances) * len(ids) / n
        return far.amax(0).tolist()

    def _losses(self, gates: Gates, rows: TaskTensors) -> list[float]:
        """Of every row of gates, as many in a forward pass as there is room for."""
        fit = max(1, self._room(rows) // len(rows["target_ids"]))
        collapse = self._collapsed(gates)
        parts = [self._losses_at_once(part, rows, collapse) for part in _parts(gates, fit)]
        return [loss for part in parts for loss in part]

    def _collapsed(self, gates: Gates) -> Collapse | None:
        """To what is open of any row of gates; `None` where the rest has no fixed values, or
        computing it costs little."""
        narrow = self.model.config.hidden_size < _WIDE
        if narrow or self.config.ablation == "resample":
            return None
        live = {site: gate.any(0) for site, gate in gates.items()}
        if self._collapse is None or not self._collapse.fits(live):
            self._collapse = Collapse(self.model, live, self.means.nodes)
        return self._collapse

    def _losses_at_once(
        self, gates: Gates, rows: TaskTensors, collapse: Collapse | None
    ) -> list[float]:
        copies = _rows_of(gates)

        def logits(_: nn.Module, part: TaskTensors) -> torch.Tensor:
            pairs = self.gated.run(part, gates, copies=copies, collapse=collapse)
            return pairs.unflatten(0, (copies, -1)).transpose(0, 1)

        batch_size = max(1, self._room(rows) // copies)
        pairs = all_pair_logits(self.model, rows, batch_size, logits)
        return [
            binary_loss(self.calibration.pairs(of_gates, rows)).item()
            for of_gates in pairs.unbind(1)
        ]

    def _room(self, rows: TaskTensors) -> int:
        """How many such rows a forward pass has, roughly."""
        numbers = rows["input_ids"].shape[1] * self.model.config.hidden_size
        return max(_ROWS, _HIDDEN_STATE // numbers)

    def _beside(self, keep: Masks, rows: TaskTensors, search: bool) -> float:
        """The loss with other nodes on; `search` lets the adversary look for a new choice."""
        widths = {site: len(mask) for site, mask in keep.items()}
        if self.config.outside == "random" and not self._outside:
            count = self.config.selection_supersets
            self._outside = [random_superset(widths, self._generator) for _ in range(count)]

        def measured(outside: list[Masks]) -> list[float]:
            stacked = _stacked(outside)
            gates = {s: mask | stacked[s].to(mask) for s, mask in keep.items()}
            return self._losses(gates, rows)

        all_of_them = search or self.config.outside == "random"
        tried = self._outside if all_of_them else self._outside[-_GLANCED_AT:]
        losses = measured(tried) if tried else []
        if self.config.outside == "random":
            return sum(losses) / len(losses)
        worst = max(losses, default=0.0)
        if search and worst <= self.target:
            # It goes on from what did most harm as well as anew: many candidates are tried, and one
            # that passes because its only attack was a weak one would be taken.
            begin = [tried[losses.index(worst)]] if losses else []
            self._outside.append(self._attacked(keep, begin))
            del self._outside[:-_REMEMBERED]
            worst = max(worst, *measured(self._outside[-1:]))
        return worst

    def _attacked(self, keep: Masks, begin: Sequence[Masks]) -> Masks:
        rows = trimmed(self._rows(few=True))
        return adversarial_superset(
            self.gated, rows, keep, lambda pairs, part: self.calibration.pairs(pairs, part),
            self._generator, self.config.selection_supersets, self.config.adversary_rate,
            most=self.config.adversary_nodes or None, begin=begin,
        )  # fmt: skip

    def reaches(self, keep: Masks, cut: Sequence[Edge] = ()) -> bool:
        """Whether the target loss is reached; what looks hopeless on a few prompts does not."""
        if self._few is not None and self.loss(keep, cut, few=True) > _HOPELESS * self.target:
            return False
        return self.loss(keep, cut) <= self.target

    def estimates(self, keep: Masks) -> Masks:
        """What dropping each kept node would add to the loss, to first order, in one backward pass.

        The gradient of the loss by a node's gate, which is open, is the negative of that (as in
        attribution patching, Nanda 2023).
        """
        rows = trimmed(self._rows(few=True))
        gates = {s: mask[None].float().requires_grad_() for s, mask in keep.items()}
        with torch.enable_grad():
            pairs = self.gated.run(rows, gates).cpu()
            loss = binary_loss(self.calibration.pairs(pairs, rows))
            if self.config.interchange:
                theirs = self.gated.counterfactual(rows)
                for swapped in self._swaps:
                    loss = loss + interchange_loss(self.gated, rows, gates, swapped, theirs).sum()
            gradients = torch.autograd.grad(loss, list(gates.values()), allow_unused=True)
        return {
            site: torch.zeros_like(mask, dtype=torch.float32) if g is None else -g[0]
            for (site, mask), g in zip(keep.items(), gradients, strict=True)
        }

    def drop_needless(
        self,
        items: Sequence[Any],
        without: Callable[[Collection[Any]], tuple[Masks, Sequence[Edge]]],
        name: str,
        progress: bool,
    ) -> list[Any]:
        """The items that can go, found greedily: cheapest first, until none of the cheapest can go.

        Args:
            items: what may go.
            without: makes the masks and the cut edges that leave the given items out.
            name: of the items, for the progress bar.
            progress: show it.
        """
        gone: list[Any] = []
        slack = _HOPELESS if self._few is not None else 1.0
        while True:
            left = [item for item in items if item not in gone]
            costs: dict[Any, float] = {}
            for start in trange(
                0, len(left), _AT_ONCE, desc=f"dropping {name}", disable=not progress, leave=False
            ):
                part = left[start : start + _AT_ONCE]
                losses = self.losses([without([*gone, item]) for item in part], few=True)
                costs |= zip(part, losses, strict=True)
            # In order of what each costs alone; what it costs beside the others is measured again.
            hopeful = sorted(
                (i for i in left if costs[i] <= slack * self.target), key=costs.__getitem__
            )
            dropped = self.drop_in_order(hopeful, without, gone, _PATIENCE)
            if not dropped:
                return gone
            gone += dropped

    def drop_in_order(
        self,
        ordered: Sequence[Any],
        without: Callable[[Collection[Any]], tuple[Masks, Sequence[Edge]]],
        gone: Sequence[Any] = (),
        patience: int | None = None,
    ) -> list[Any]:
        """Drop what can go, in the order given: many at once while that works, then fewer.

        Args:
            ordered: items to try.
            without: as for [`Selector.drop_needless`].
            gone: items that have gone before.
            patience: give up after so many items that could not go.
        """
        dropped: list[Any] = []
        at, chunk, failures = 0, max(1, len(ordered) // 2), 0
        while at < len(ordered) and (patience is None or failures < patience):
            part = ordered[at : at + chunk]
            if self.reaches(*without([*gone, *dropped, *part])):
                dropped += part
                at += len(part)
                chunk *= 2
            elif len(part) > 1:
                chunk = len(part) // 2
            else:
                at, failures = at + 1, failures + 1
        return dropped


def _stacked(masks: Sequence[Masks]) -> Gates:
    """As rows of gates."""
    return {site: torch.stack([of_sites[site] for of_sites in masks]) for site in masks[0]}


def _rows_of(gates: Gates) -> int:
    return len(next(iter(gates.values())))


def _parts(gates: Gates, fit: int) -> Iterator[Gates]:
    """Rows of gates, at most so many at a time."""
    for start in range(0, _rows_of(gates), fit):
        yield {site: gate[start : start + fit] for site, gate in gates.items()}
