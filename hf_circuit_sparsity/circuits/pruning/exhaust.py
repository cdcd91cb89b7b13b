"""How many ways a model has to solve a task: search, exclude what was found, search again.

A circuit may have backups, and weight-sparse models have many cheap ones over a small core. The
core are the nodes of a circuit without each of which the whole model misses the target; all else is
excluded from the next search, until the target is out of reach.
"""

from dataclasses import dataclass, replace

import torch
from torch import nn

from ...tasks.binary_task import BinaryTask
from ..ablation import ReferenceTokens, means_over, measuring, unwrapped
from ..circuit import Circuit
from ..task_scores import model_scores, task_rows
from .config import PruningConfig
from .find import TaskNotLearnedError, find_circuits, searched_task, smallest
from .selector import Selector


@dataclass(frozen=True)
class Ways:
    """The circuits of one task in one model that share nothing but their core.

    Attributes:
        circuits: in the order they were found.
        core: site → indices of nodes that are in a circuit, and without each of which the whole
            model misses the target.
        exhausted: whether the search ended since the target was out of reach, and not by the
            number of rounds.
    """

    circuits: tuple[Circuit, ...]
    core: dict[str, list[int]]
    exhausted: bool


def exhaust_circuits(
    model: nn.Module,
    task: BinaryTask,
    config: PruningConfig | None = None,
    *,
    rounds: int = 8,
    reference: ReferenceTokens = None,
    progress: bool = True,
) -> Ways:
    """Find circuits that are disjoint but for their core, until there is none any more.

    Args:
        model: as for [`find_circuit`].
        task: as for [`find_circuit`].
        config: of every search.
        rounds: searches, at most.
        reference: as for [`find_circuit`].
        progress: show progress bars.

    Raises:
        TaskNotLearnedError: the model itself does not reach the target.
        ValueError: `rounds` is below 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds={rounds} was passed, expected at least 1.")
    config = config or PruningConfig()
    model = unwrapped(model)
    means = means_over(model, task, reference, config.reference_tokens, progress)
    with measuring(model):
        rows = searched_task(model, task, config).tensors("train")
        whole = model_scores(model, rows, task.tensors("test"), config.calibration_steps)
        some = task_rows(rows, slice(config.selection_prompts))
        # What the whole model can do without a node, not what a circuit can.
        plain = replace(config, outside="off", ablation="mean", freeze_norms=False)
        selector = Selector(model, some, means, whole.calibration, plain)
        circuits: list[Circuit] = []
        core: dict[str, list[int]] = {}
        exclude: dict[str, set[int]] = {}
        while len(circuits) < rounds:
            try:
                found = find_circuits(
                    model, task, config, reference=means, exclude=exclude, progress=progress
                )
            except TaskNotLearnedError:
                if not circuits:
                    raise
                return Ways(tuple(circuits), core, True)
            circuits.append(smallest(found))
            for site, ids in circuits[-1].nodes.items():
                needed = [i for i in ids if not _can_do_without(selector, site, i)]
                if needed:
                    core[site] = sorted({*core.get(site, ()), *needed})
                exclude.setdefault(site, set()).update(set(ids) - set(needed))
            if not any(len(ids) for ids in exclude.values()):
                return Ways(tuple(circuits), core, True)
    return Ways(tuple(circuits), core, False)


def _can_do_without(selector: Selector, site: str, index: int) -> bool:
    keep = {s: torch.ones(len(mean), dtype=torch.bool) for s, mean in selector.means.nodes.items()}
    keep[site][index] = False
    return selector.reaches(keep)
