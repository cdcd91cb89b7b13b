"""Whether a circuit answers as the whole model does when its nodes are swapped.

A part that goes with the answer without causing it suffices alone and beside whatever else is on.
But where its nodes are swapped from the counterfactual prompt into the otherwise untouched model,
the model does not care (Geiger et al. 2021, arXiv 2106.02997). To ask that the answer turns when
all nodes are swapped is not enough: a circuit of such a part and of the one node through which
the true mechanism speaks would pass. So some of its nodes are swapped, in the whole model and in
the circuit that runs alone, and both must answer alike.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from .ablation import TOKENS
from .gating import GatedModel, Gates
from .supersets import random_superset
from .task_scores import Calibration, TaskTensors

Swapped = dict[str, Tensor]
"""Site → bool `(width,)`: which nodes are swapped, where they are in the circuit."""


class Swaps:
    """Draws which nodes are swapped: all up to some depth, or any up to there.

    Args:
        widths: site → number of nodes, in the order of computation; tokens are never swapped.
        generator: of the draws.
    """

    def __init__(self, widths: Mapping[str, int], generator: torch.Generator):
        self.widths = {site: width for site, width in widths.items() if site != TOKENS}
        self.generator = generator
        # With each attention and each MLP one goes a step deeper.
        parts = [site.rsplit(".", 1)[0] for site in self.widths]
        ends = zip(parts, [*parts[1:], None], strict=True)
        self.depths = [i for i, (part, after) in enumerate(ends, 1) if part != after]

    def draw(self) -> Swapped:
        """For one batch."""
        at = int(torch.randint(len(self.depths), (), generator=self.generator))
        whole = bool(torch.rand((), generator=self.generator) < 0.5)
        return self._up_to(self.depths[at], 1.0 if whole else 0.5)

    def spread(self, count: int) -> list[Swapped]:
        """Up to each of so many depths, evenly spaced: all nodes, then a half and the other."""
        count, swaps = min(count, len(self.depths)), []
        for i in range(count):
            end = self.depths[(i + 1) * len(self.depths) // count - 1]
            half = self._up_to(end, 0.5)
            others = {site: ~nodes for site, nodes in half.items()}
            swaps += [self._up_to(end, 1.0), half, others]
        return swaps

    def _up_to(self, end: int, share: float) -> Swapped:
        return random_superset(dict(list(self.widths.items())[:end]), self.generator, share)


def disagreement(whole: Tensor, alone: Tensor) -> Tensor:
    """KL(whole ‖ alone) over the two candidates, of logits `(..., n, 2)`: mean over n, in nats."""
    whole, alone = whole.log_softmax(-1), alone.log_softmax(-1)
    return (whole.exp() * (whole - alone)).sum(-1).mean(-1)


def interchange_loss(
    gated: GatedModel,
    rows: TaskTensors,
    gates: Gates,
    swapped: Swapped,
    theirs: Mapping[str, Tensor] | None = None,
    copies: int = 1,
    calibration: Calibration | None = None,
) -> Tensor:
    """How far circuits are from the whole model while their nodes are swapped, `(k,)`, in nats.

    Args:
        gated: the model.
        rows: of the task, as for [`GatedModel.run`].
        gates: k circuits', as for [`GatedModel.run`].
        swapped: which nodes are, if they are the circuit's.
        theirs: what nodes are in the counterfactual prompts, if it is known already.
        copies: how often the rows are repeated.
        calibration: of both sides' logits, for `copies` that are k.
    """
    theirs = gated.counterfactual(rows) if theirs is None else theirs
    k = len(next(iter(gates.values())))
    answers = []
    for alone in (False, True):
        pairs = gated.interchanged(rows, gates, swapped, theirs, alone, copies)
        pairs = pairs.unflatten(0, (k, -1))
        if calibration is not None:
            pairs = torch.stack([calibration.pairs(of_one.cpu(), rows) for of_one in pairs])
        answers.append(pairs)
    return disagreement(*answers)
