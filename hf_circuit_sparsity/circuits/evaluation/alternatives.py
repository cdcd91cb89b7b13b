"""The same search elsewhere: other seeds, other prompts, and where there is nothing to find.

Circuits vary with the batch and with the wording of prompts; and masks reach a low loss on
nonsense tasks too. Both are shown beside what was found.
"""

from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from datasets import Dataset
from torch import nn

from ...tasks.binary_task import BinaryTask
from ..ablation import ReferenceMeans, ReferenceTokens, mean_ablated, means_over
from ..circuit import Circuit
from ..pruning.config import PruningConfig
from ..pruning.find import (
    TaskNotLearnedError,
    check_lengths,
    find_circuits,
    means_for,
    searched_task,
)
from ..pruning.masks import Masks, learn_masks
from ..pruning.selector import Selector
from ..pruning.shrink import bisect, drop_unconnected, drop_unneeded
from ..task_scores import (
    Calibration,
    TaskTensors,
    all_pair_logits,
    binary_accuracy,
    binary_loss,
    candidates,
    task_rows,
)
from .verdict import PROMPTS, SEEDS, WORDINGS


def other_circuits(
    circuit: Circuit,
    model: nn.Module,
    task: BinaryTask,
    searches: int,
    reference: ReferenceTokens | ReferenceMeans = None,
    progress: bool = True,
) -> dict[str, list[Circuit]]:
    """Circuits found as this one was, but from other seeds, on other prompts and other wordings.

    Args:
        circuit: of `model`; its `config` says how it was found.
        model: in eval mode.
        task: the circuit's.
        searches: of each kind. Other prompts are disjoint parts of the training prompts, as many
            as searches; other wordings likewise of the held-out ones, whose templates and names
            the circuit was not found with.
        reference: see [`find_circuit`].
        progress: show progress bars.

    Returns:
        By kind. A kind is left out if the model does not reach the target on its prompts.
    """
    seed = int(circuit.config.get("seed", 0)) + 1000
    config = PruningConfig.from_stored(circuit.config, num_seeds=searches, seed=seed)
    means = means_over(model, task, reference, config.reference_tokens, progress)

    def found(of: BinaryTask, config: PruningConfig) -> list[Circuit]:
        return find_circuits(model, of, config, reference=means, progress=progress)

    # Distractors before they are parted, or all parts would have the same ones.
    seen = searched_task(model, task, config)
    unseen = searched_task(model, replace(task, train=task.test, test=task.train), config, "test")
    alone = replace(config, num_seeds=1, distractor_fraction=0.0)
    kinds = {SEEDS: found(task, config)}
    for kind, of in ((PROMPTS, seen), (WORDINGS, unseen)):
        try:
            parts = _parts(of.train, searches)
            kinds[kind] = [found(replace(of, train=part), alone)[0] for part in parts]
        except TaskNotLearnedError:
            continue
    return kinds


def _parts(rows: Dataset, count: int) -> list[Dataset]:
    """Disjoint parts of a task's rows, both directions of a pair in the same."""
    pairs = torch.randperm(len(rows) // 2, generator=torch.Generator().manual_seed(0))
    ids = [torch.stack([2 * p, 2 * p + 1], 1).flatten().tolist() for p in pairs.chunk(count)]
    return [rows.select(part) for part in ids]


@dataclass(frozen=True)
class Fabricated:
    """What a search makes of a task or a model in which there is nothing to be found.

    Attributes:
        nodes: of the circuit; where the target is out of reach, the nodes whose masks are open.
        loss: on the training prompts it was selected on, nats.
        held_out: on held-out prompts.
        accuracy: on the former, which no calibration has a say in; guessing is 0.5.
        reached: whether the target was.
    """

    nodes: int
    loss: float
    held_out: float
    accuracy: float
    reached: bool


def fabricated_circuits(
    circuit: Circuit,
    model: nn.Module,
    task: BinaryTask,
    calibration: Calibration,
    reference: ReferenceTokens | ReferenceMeans = None,
    progress: bool = True,
) -> dict[str, Fabricated]:
    """The search that found a circuit, on a nonsense task and on the model with its weights
    shuffled; without the check that the model has learned the task.

    Args:
        circuit: its `config` says how it was found.
        model: in eval mode.
        task: the circuit's.
        calibration: the whole model's on that task; nothing is calibrated anew.
        reference: for means; those of the shuffled model are its own.
        progress: show progress bars.

    Raises:
        ValueError: the circuit was found with activations of counterfactual prompts, and those of
            this task are of other lengths.
    """
    config = PruningConfig.from_stored(circuit.config, num_seeds=1)
    check_lengths(task, config)
    searched = searched_task(model, task, config)
    real = [searched.tensors(split) for split in ("train", "test")]
    nonsense = [nonsense_answers(tensors) for tensors in real]
    means = means_for(model, task, real[0], reference, config, progress)
    made = {"nonsense task": _fabricated(model, *nonsense, means, calibration, config, progress)}
    if not isinstance(reference, ReferenceMeans):
        shuffled = shuffled_weights(model, torch.Generator().manual_seed(config.seed))
        means = means_for(shuffled, task, real[0], reference, config, progress=False)
        made["shuffled weights"] = _fabricated(
            shuffled, *real, means, calibration, config, progress
        )
    return made


def _fabricated(
    model: nn.Module, train: TaskTensors, test: TaskTensors, means: ReferenceMeans,
    calibration: Calibration, config: PruningConfig, progress: bool,
) -> Fabricated:  # fmt: skip
    order = torch.randperm(
        len(train["target_ids"]), generator=torch.Generator().manual_seed(config.seed)
    )
    train = task_rows(train, order)
    selection = task_rows(train, slice(config.selection_prompts))
    selector = Selector(model, selection, means, calibration, config)
    (scores,) = learn_masks(model, train, means.nodes, config, [config.seed], progress)
    keep: Masks = {site: score > 0 for site, score in scores.items()}
    reached = selector.reaches(keep)
    if reached:
        keep = drop_unconnected(model, bisect(scores, selector, keep), selector)
        if config.cleanup:
            keep = drop_unneeded(keep, selector, progress)
    with mean_ablated(model, keep, means.nodes):
        on_train, on_test = (
            calibration.pairs(all_pair_logits(model, rows), rows) for rows in (selection, test)
        )
    return Fabricated(
        nodes=sum(int(mask.sum()) for mask in keep.values()),
        loss=binary_loss(on_train).item(),
        held_out=binary_loss(on_test).item(),
        accuracy=binary_accuracy(on_train),
        reached=reached,
    )


def nonsense_answers(tensors: TaskTensors) -> dict[str, torch.Tensor]:
    """A task's prompts with answers that a token decides which has nothing to do with them.

    It is at the place, counted from the end, where a split of the vocabulary in two halves splits
    the prompts most evenly while both prompts of a pair say the same; the candidate with the
    smaller id is right in the lower half.
    """
    ids, real = tensors["input_ids"], tensors["attention_mask"].bool().all(0)
    pairs = ids.unflatten(0, (-1, 2))
    same = (pairs[:, 0] == pairs[:, 1]).all(0) & real
    best = None
    for place in same.nonzero()[:, 0].tolist():
        column = ids[:, place]
        lower = column <= column.median()
        evenness = float(min(lower.float().mean(), 1 - lower.float().mean()))
        if best is None or evenness > best[0]:
            best = evenness, lower
    if best is None or best[0] < 0.1:  # no such token: a coin for every pair
        coin = torch.rand(len(pairs), generator=torch.Generator().manual_seed(0)) < 0.5
        lower = coin.repeat_interleave(2)
    else:
        lower = best[1]
    both = candidates(tensors)
    low, high = both.amin(1), both.amax(1)
    return {
        **tensors,
        "target_ids": torch.where(lower, low, high),
        "counterfactual_target_ids": torch.where(lower, high, low),
    }


@torch.no_grad()
def shuffled_weights(model: nn.Module, generator: torch.Generator) -> nn.Module:
    """A copy in which the entries of every matrix are permuted."""
    copy = deepcopy(model)
    for p in copy.parameters():
        if p.dim() > 1:
            order = torch.randperm(p.numel(), generator=generator).to(p.device)
            p.copy_(p.flatten()[order].view_as(p))
    return copy
