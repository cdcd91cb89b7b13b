"""Finding a circuit: learn which nodes a behaviour needs (Gao et al. 2025, section 2 and A.5).

One mask parameter τ per node is trained so that the model, with every node of τ ≤ 0 fixed at its
mean, still solves the task with as few nodes as possible. Then nodes are ranked by τ, the smallest
number of them that reaches the target loss is found by bisection, and what turns out not to be
needed is dropped one by one. With several seeds the smallest circuit wins.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import combinations
from typing import Any

import torch
from torch import nn

from ...modeling.fingerprint import model_fingerprint
from ...tasks.adversarial import with_distractors
from ...tasks.binary_task import BinaryTask
from ...tasks.definitions.base import Split
from ..ablation import (
    TOKENS,
    ReferenceMeans,
    ReferenceTokens,
    means_over,
    measuring,
    node_sites,
    task_means,
    unwrapped,
)
from ..circuit import Circuit
from ..circuit_file import model_source
from ..edges import circuit_edges, cut_offsets
from ..evaluation.faithfulness import evaluate_circuit
from ..task_scores import TaskTensors, binary_loss, model_scores, task_rows
from .config import PruningConfig
from .masks import Masks, learn_masks, width
from .selector import Selector
from .shrink import bisect, drop_edges, drop_unconnected, drop_unneeded


class TaskNotLearnedError(ValueError):
    """The model itself does not reach the loss that a circuit of it was asked to reach."""


def find_circuit(
    model: nn.Module,
    task: BinaryTask,
    config: PruningConfig | None = None,
    *,
    reference: ReferenceTokens = None,
    progress: bool = True,
) -> Circuit:
    """Find the smallest circuit of `model` that solves `task`.

    Args:
        model: a decoder that is described, see `docs/decoders.md`; its weights are left alone.
        task: made with the model's tokenizer.
        config: how to look.
        reference: sample of the pretraining distribution for the nodes' means: a
            `datasets.Dataset` with an `input_ids` column, or token ids `(n, length)`. If not given,
            the Python standard library, tokenized by `task.tokenizer`.
        progress: show a progress bar.

    Returns:
        The circuit, with losses on training and held-out prompts in `.metrics`; with several seeds
        also `seed_jaccard`, how much the seeds' circuits have in common.

    Raises:
        TaskNotLearnedError: the model itself does not reach `config.target_loss`; says what it
            reaches.
        ValueError: a prompt is longer than the model's context.
    """
    circuits = find_circuits(model, task, config, reference=reference, progress=progress)
    return smallest(circuits)


def find_circuits(
    model: nn.Module,
    task: BinaryTask,
    config: PruningConfig | None = None,
    *,
    reference: ReferenceTokens | ReferenceMeans = None,
    targets: Sequence[float] | None = None,
    exclude: Mapping[str, Collection[int]] | None = None,
    progress: bool = True,
) -> list[Circuit]:
    """Find the circuits of all seeds, and of several target losses.

    Masks are learned once per seed; each next target starts from the circuit of the one before.

    Args:
        model: as for [`find_circuit`].
        task: as for [`find_circuit`].
        config: how to look.
        reference: as for [`find_circuit`], or the means themselves, from [`reference_means`], to
            compute them once for many calls.
        targets: losses in nats, ascending, in place of `config.target_loss`.
        exclude: site → indices of nodes that no circuit may have.
        progress: show a progress bar.

    Returns:
        Target by target, and for each target seed by seed; a circuit's `config` names both.

    Raises:
        TaskNotLearnedError: the model itself does not reach the first target, or not without what
            is excluded.
        ValueError: targets that do not ascend, a site that there is not, or a prompt longer than
            the model's context.
    """
    config = config or PruningConfig()
    targets = [config.target_loss] if targets is None else list(targets)
    if not targets or targets != sorted(targets):
        raise ValueError(f"targets={targets} was passed, expected ascending losses.")
    configs = [replace(config, target_loss=target) for target in targets]
    node_sites(model)  # fails early on models that have none
    model = unwrapped(model)
    with measuring(model):
        check_prompts_fit(model, task)
        check_lengths(task, config)
        task = searched_task(model, task, config)
        train = task.tensors("train")
        whole = model_scores(model, train, task.tensors("test"), config.calibration_steps)
        # In a seeded order, so that any prefix is a fair sample.
        generator = torch.Generator().manual_seed(config.seed)
        order = torch.randperm(len(train["target_ids"]), generator=generator)
        train = task_rows(train, order)
        selection = task_rows(train, slice(config.selection_prompts))
        pairs = whole.train[order[: config.selection_prompts]]
        _check_learned(task, whole.calibration.pairs(pairs, selection), configs[0])
        means = means_for(model, task, train, reference, config, progress)
        sites = dict(means.nodes)
        if config.token_nodes:
            sites[TOKENS] = means.token
        allowed = _allowed(model, sites, exclude) if exclude else None
        if allowed is not None:
            selector = Selector(model, selection, means, whole.calibration, configs[0])
            if not selector.reaches(allowed):
                raise TaskNotLearnedError(
                    f"Without the {sum(map(len, exclude.values()))} nodes that are excluded the "
                    f"model does not reach target_loss={targets[0]:g} on the task {task.name!r}."
                )
        seeds = range(config.seed, config.seed + config.num_seeds)
        learned = learn_masks(model, train, sites, config, seeds, progress, allowed)
        by_target: list[list[Circuit]] = [[] for _ in targets]
        for seed, scores in zip(seeds, learned, strict=True):
            keep = None
            for at_target, circuits in zip(configs, by_target, strict=True):
                selector = Selector(model, selection, means, whole.calibration, at_target)
                if keep is None or not config.cleanup:  # which alone makes use of more room
                    keep = bisect(scores, selector, allowed)
                keep = drop_unconnected(model, keep, selector)
                if config.cleanup:
                    keep = drop_unneeded(keep, selector, progress)
                circuit = _circuit(model, task, keep, scores, selector, progress)
                circuit.config = {**asdict(at_target), "seed": seed}
                circuit.metrics = evaluate_circuit(circuit, model, task, whole=whole)
                circuits.append(circuit)
        return [circuit for circuits in by_target for circuit in circuits]


def _allowed(
    model: nn.Module, sites: Mapping[str, torch.Tensor], exclude: Mapping[str, Collection[int]]
) -> Masks:
    """Site → bool `(width,)`: every node but those that are excluded."""
    if unknown := sorted(exclude.keys() - sites.keys()):
        raise ValueError(f"exclude names {unknown[0]!r}, which is no node site of this model.")
    allowed = {s: torch.ones(width(model, s, m), dtype=torch.bool) for s, m in sites.items()}
    for site, indices in exclude.items():
        allowed[site][list(indices)] = False
    return allowed


def means_for(
    model: nn.Module,
    task: BinaryTask,
    train: TaskTensors,
    reference: ReferenceTokens | ReferenceMeans,
    config: PruningConfig,
    progress: bool,
) -> ReferenceMeans:
    """What closed nodes are fixed at; with "resample", where the circuit runs afterwards."""
    if config.ablation == "task_mean":
        return task_means(model, train)
    means = means_over(model, task, reference, config.reference_tokens, progress)
    if config.ablation == "zero":
        zeros = [{s: torch.zeros_like(m) for s, m in part.items()} for part in means[:2]]
        return ReferenceMeans(*zeros, torch.zeros_like(means.token))
    return means


def smallest(circuits: Sequence[Circuit]) -> Circuit:
    """The smallest circuit; where there are several, its metrics say how much they share."""
    best = min(circuits, key=circuit_size)
    if len(circuits) > 1:
        best.metrics["seed_jaccard"] = mean_jaccard(circuits)
    return best


def circuit_size(circuit: Circuit) -> tuple[float, ...]:
    """What makes a circuit smaller than another: edges, then nodes, then tokens, then loss."""
    m = circuit.metrics
    return (m["edges"], m["nodes"], m.get("token_nodes", 0), m["train_circuit_loss"])


def mean_jaccard(circuits: Sequence[Circuit]) -> float:
    """Mean of [`Circuit.jaccard`] over all pairs."""
    pairs = list(combinations(circuits, 2))
    return sum(a.jaccard(b) for a, b in pairs) / len(pairs)


def searched_task(
    model: nn.Module, task: BinaryTask, config: PruningConfig, split: Split = "train"
) -> BinaryTask:
    """The task with the training prompts that a search uses.

    Args:
        split: whose templates and names the task's training rows are of.

    Raises:
        ValueError: no distractors are known for the task, or too few fit into the context.
    """
    context = getattr(model.config, "max_position_embeddings", None)
    return with_distractors(
        task, config.distractor_fraction, seed=config.seed, max_length=context, split=split
    )


def check_prompts_fit(model: nn.Module, task: BinaryTask) -> None:
    """Raise a `ValueError` if a prompt of the task is longer than the model's context."""
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None and task.longest_prompt > context:
        raise ValueError(
            f"The task {task.name!r} has a prompt of {task.longest_prompt} tokens, but the model "
            f"reads at most {context}; make the task with max_length={context} to see which, and "
            "use shorter prompts or a model with a longer context."
        )


def check_lengths(task: BinaryTask, config: PruningConfig) -> None:
    """Raise a `ValueError` if activations of counterfactual prompts are to be taken that do not fit
    the prompts."""
    settings = []
    if config.ablation == "resample":
        settings.append("ablation='resample'")
    if config.interchange:
        settings.append(f"interchange={config.interchange:g}")
    if settings and not task.equal_length:
        raise ValueError(
            f"The task {task.name!r} has prompts that are not as long as their counterfactuals, so "
            f"{' and '.join(settings)} cannot take activations from there: leave that out."
        )


def _check_learned(task: BinaryTask, pairs: torch.Tensor, config: PruningConfig) -> None:
    target = config.target_loss * config.selection_margin
    loss = binary_loss(pairs)
    if not loss <= target:
        guessing = ", no better than guessing" if loss > 0.95 * math.log(2) else ""
        advice = (
            "train the model longer, or see whether the task's prompts decide its answers"
            if guessing
            else f"train the model longer, or set target_loss above "
            f"{loss / config.selection_margin:.2f}"
        )
        raise TaskNotLearnedError(
            f"The whole model reaches a loss of {loss:.3f} on the task {task.name!r}{guessing}, so "
            f"no circuit of it can reach target_loss={config.target_loss:g} (selected at "
            f"{target:.3g} on training prompts); {advice}."
        )


def _circuit(
    model: nn.Module,
    task: BinaryTask,
    keep: Masks,
    scores: Masks,
    selector: Selector,
    progress: bool,
) -> Circuit:
    """The circuit of these nodes, its edges pruned if that is asked for."""
    config = selector.config
    cut = []
    if config.prune_edges:
        keep, cut = drop_edges(model, keep, selector, progress)
    nodes = {s: mask.nonzero()[:, 0].tolist() for s, mask in keep.items() if s != TOKENS}
    pruned: dict[str, Any] = {}
    if config.prune_edges:
        gone = set(cut)
        pruned["kept_edges"] = [e.name for e in circuit_edges(model, nodes) if e not in gone]
        pruned["edge_offsets"] = cut_offsets(cut, selector.means)
    if config.token_nodes:
        pruned["tokens"] = keep[TOKENS].nonzero()[:, 0].tolist()
        pruned["token_mean"] = selector.means.token.cpu()
    model_name, model_revision = model_source(model)
    return Circuit(
        nodes=nodes,
        means={site: mean.cpu() for site, mean in selector.means.nodes.items()},
        scores={site: score.cpu() for site, score in scores.items() if site != TOKENS},
        calibration=selector.calibration,
        task=task.name,
        own_task=task.text,
        model_fingerprint=model_fingerprint(model),
        model_name=model_name,
        model_revision=model_revision,
        example=task_example(task),
        **pruned,
    )


def task_example(task: BinaryTask) -> dict[str, Any]:
    """The first held-out prompt and its counterfactual, as of [`Circuit.example`]."""
    row = task.test[0]
    example = {}
    for side in ("", "counterfactual_"):
        example |= {f"{side}{name}": row[f"{side}{name}"] for name in ("prompt", "target")}
        example[f"{side}token_ids"] = list(row[f"{side}input_ids"])
        example[f"{side}target_id"] = int(row[f"{side}target_id"])
    return example
