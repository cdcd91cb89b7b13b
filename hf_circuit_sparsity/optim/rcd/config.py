"""The settings of random coordinate descent."""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from ..settings import check, is_fraction, is_number, is_share, is_whole
from ..sparse_init import SUPPORTS, Support
from .blocks import BLOCK_KINDS, SELECTIONS, BlockKind, Selection

Update = Literal["adam", "plain"]

# Of the optimizer as a whole; all others are settings of a parameter group.
_GLOBAL = ("init", "staleness", "average_gradients")


@dataclass
class RCDConfig:
    """How [`RCDSparseOptimizer`] chooses coordinates and moves them.

    Args:
        selection: how blocks are drawn, see [`draw_block`]: "uniform", "magnitude" (MB-RCD),
            "cyclic", or "gradient" (Gauss-Southwell on the block: drawn uniformly, but of its zeros
            only the `greedy_fraction` with the largest gradients move).
        block: "rows" (output neurons), "columns" (inputs) or single "entries"; vectors have entries
            only.
        block_fraction: share of each sparse parameter in a block, in (0, 1].
        block_steps: steps for which a block stays.
        rest_steps: steps after every stay in which no zeros are looked at.
        update: "adam" or "plain" gradient descent.
        move_active: whether nonzeros outside the block move.
        clip_threshold: what is smaller in magnitude becomes zero.
        l1: weight of an L1 penalty, applied as a proximal step (soft threshold `lr * l1`).
        magnitude_power, magnitude_floor: exponent of the weights in "magnitude", and the share of
            its probability that is spread evenly, in (0, 1]. What "magnitude" minimizes does not
            depend on them; a low floor leaves zeros waiting `1 / magnitude_floor` times as long.
        greedy_fraction: share of a block's zeros that "gradient" moves, in (0, 1].
        replace_fraction: share of the active coordinates, the smallest, that give way at the end of
            every stay to as many of the block's zeros, however small these begin: with the largest
            gradients by "gradient", else drawn at random. It falls to 0 at `explore_end`, as a
            cosine where `total_steps` is known (Evci et al. 2020). At 0 a zero grows by outgrowing
            an active coordinate, which `greedy_fraction` bounds.
        grace_steps: a coordinate that grew does not drop for so many steps; needs "adam".
        start_density: share of nonzeros before the first step, from the target density to 1. It
            falls by equal factors and reaches the target at `anneal_end`. None: the target from the
            first step on.
        explore_end: fraction of the steps from which on no blocks are drawn, no zeros are looked
            at, and only nonzeros move.
        staleness: all gradients are used so many steps after they were computed, and what grows
            twice as many, so that a process waits only for one that is further behind; what is on
            its way is not saved.
        average_gradients: with several processes, every one computes the gradient at all active
            coordinates, and these are averaged. By default each has its own part of them, and so a
            coordinate sees the data of one process alone, as those of a block do in either case.
        init: how [`SparseTrainer`] thins out a model that is too dense: "random" suits a fresh one,
            "magnitude" (keep the largest) a trained one.

    Raises:
        ValueError: if a setting is unknown or out of range.
    """

    selection: Selection = "uniform"
    block: BlockKind = "rows"
    block_fraction: float = 1 / 16
    block_steps: int = 1
    rest_steps: int = 0
    update: Update = "adam"
    move_active: bool = True
    clip_threshold: float = 0.0
    l1: float = 0.0
    magnitude_power: float = 1.0
    magnitude_floor: float = 0.5
    greedy_fraction: float = 1 / 16
    replace_fraction: float = 0.0
    grace_steps: int = 0
    start_density: float | None = None
    explore_end: float = 1.0
    staleness: int = 0
    average_gradients: bool = False
    init: Support = "random"

    def __post_init__(self) -> None:
        for name, known in (
            ("selection", SELECTIONS),
            ("block", BLOCK_KINDS),
            ("update", get_args(Update)),
            ("init", SUPPORTS),
        ):
            value = getattr(self, name)
            check(name, value, value in known, f"one of {', '.join(known)}")
        for name in ("block_fraction", "greedy_fraction", "magnitude_floor"):
            value = getattr(self, name)
            check(name, value, is_share(value), "a share in (0, 1]")
        for name in ("clip_threshold", "l1", "magnitude_power"):
            value = getattr(self, name)
            holds = is_number(value) and 0 <= value < math.inf
            check(name, value, holds, "a finite number >= 0")
        for name, least in (
            ("block_steps", 1), ("rest_steps", 0), ("grace_steps", 0), ("staleness", 0)
        ):  # fmt: skip
            value = getattr(self, name)
            check(name, value, is_whole(value, least), f"a whole number >= {least}")
        for name in ("move_active", "average_gradients"):
            value = getattr(self, name)
            check(name, value, isinstance(value, bool), "True or False")
        replaced, grace = self.replace_fraction, self.grace_steps
        holds = is_number(replaced) and 0 <= replaced < 1
        check("replace_fraction", replaced, holds, "a share of the active coordinates in [0, 1)")
        holds = not grace or self.update == "adam"
        check("grace_steps", grace, holds, 'update="adam", which counts the age of coordinates')
        start, end = self.start_density, self.explore_end
        check("start_density", start, start is None or is_share(start), "None or in (0, 1]")
        check("explore_end", end, is_fraction(end), "a fraction of the steps in [0, 1]")

    def check_run(
        self, target_density: float | None, anneal_end: float, total_steps: int | None
    ) -> None:
        """Check what depends on the run.

        Raises:
            ValueError: if a value is out of range, or does not go with the others.
        """
        target, start = target_density, self.start_density
        holds = target is None or is_share(target)
        check("target_density", target, holds, "a share of weights in (0, 1], or None for no limit")
        if start is not None and (target_density is None or start < target_density):
            raise ValueError(
                f"start_density={start!r} does not go with target_density={target_density!r}: the "
                "density can only fall; pass a target at or below the start."
            )
        if target is None and self.replace_fraction:
            raise ValueError(
                f"replace_fraction={self.replace_fraction!r} was passed without a target_density: "
                "pass one, within which coordinates can be replaced."
            )
        holds = is_fraction(anneal_end)
        check("anneal_end", anneal_end, holds, "a fraction of the steps in [0, 1]")
        if start is not None or self.explore_end < 1:
            expected = "the steps of the run, which start_density and explore_end need"
            check("total_steps", total_steps, is_whole(total_steps, 1), expected)

    def group_settings(self) -> dict[str, Any]:
        """The settings that a parameter group may change."""
        return {name: value for name, value in asdict(self).items() if name not in _GLOBAL}

    @classmethod
    def of_group(cls, group: dict[str, Any]) -> "RCDConfig":
        """The settings of a parameter group."""
        return cls(**{name: group[name] for name in cls().group_settings()})
