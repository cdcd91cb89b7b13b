"""Checks that would catch a wrong circuit, each beside random circuits of equal size.

Sufficiency, necessity and the sizes are those of Gao et al. 2025, section 2; completeness is
that of Wang et al. 2022 (arXiv 2211.00593, section 4); interchange is the intervention of Geiger et
al. 2021 (arXiv 2106.02997); ablation in other ways is asked for by Miller et al. 2024 (arXiv
2407.08734).
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, partial
from math import inf

import torch
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from ...decoders.decoder import decoder_of
from ...metrics.circuit_faithfulness.pair_agreement import agreement, pair_kl
from ...tasks.adversarial import load_adversarial_tasks
from ...tasks.binary_task import BinaryTask
from ..ablation import (
    ReferenceTokens,
    hooked,
    in_eval_mode,
    mean_ablated,
    unwrapped,
)
from ..attention import attention_patterns, overlap, value_heads
from ..circuit import Circuit
from ..gating import GatedModel
from ..pruning.config import PruningConfig
from ..pruning.find import (
    TaskNotLearnedError,
    check_prompts_fit,
    find_circuits,
    jaccard,
    mean_jaccard,
)
from ..supersets import adversarial_superset, random_superset
from ..task_scores import (
    Calibration,
    TaskTensors,
    all_pair_logits,
    binary_accuracy,
    binary_loss,
    candidates,
    model_scores,
    next_token_logits,
    task_rows,
    trimmed,
)
from .checks import Check, Verification
from .interventions import Interchange, OtherAblations, equally_long

GUESSING = 0.6931  # nats; ln 2
_ATTACKED = 4  # random circuits that what takes long is done to: an adversary, other ablations
# Threshold (a string is a setting of the search), whether it must be at least that, and meaning.
_CHECKS: dict[str, tuple[float | str | None, bool, str]] = {
    "sufficiency": ("target_loss", False, "loss of the circuit alone, nats"),
    "necessity": (0.5, True, "share of the model's skill that goes with the circuit"),
    "completeness": (0.2, False, "loss of circuit and model without random parts, difference"),
    "random supersets": (0.8, True, "skill with random parts of the rest on, mean; of the model's"),
    "worst superset": (None, True, "the least of those"),
    "adversarial superset": (
        0.8,
        True,
        "skill with the part of the rest on that an adversary picks",
    ),
    "interchange": (0.75, True, "answers that flip when only its nodes see the other prompt"),
    "logit difference moved": (None, True, "by those nodes, of the way to the other prompt's"),
    "moved by layer": (None, True, "by those of {where} alone"),
    "transfer": (0.9, True, "skill on unseen templates, as a share of the model's"),
    "pair KL": ("target_loss", False, "model's answer against the circuit's, of two candidates"),
    "vocabulary KL": (None, False, "model's next token against the circuit's"),
    "task-mean ablation": (None, False, "loss alone, the rest at its mean on the task's prompts"),
    "zero ablation": (None, False, "loss alone, the rest at zero"),
    "resample ablation": (None, False, "loss alone, the rest as in the counterfactual prompt"),
    "frozen norms": (None, False, "loss alone, norms dividing as in the whole model"),
    "attention agreement": (None, True, "its heads' patterns, circuit alone against the model"),
    "stability": (0.5, True, "nodes shared with circuits of other seeds (Jaccard)"),
    "adversarial": (0.75, True, "agreement with the model where {where}"),
    "accuracy": (None, True, "right where {where}; the model: {accuracy:.3f}"),
}


def verify_circuit(
    circuit: Circuit,
    model: nn.Module,
    task: BinaryTask,
    *,
    prompts: int = 256,
    random_circuits: int = 20,
    subsets: int = 6,
    supersets: int = 8,
    adversary_steps: int = 12,
    stability_seeds: int = 2,
    reference: ReferenceTokens = None,
    others: Sequence[Circuit] | None = None,
    adversarial: dict[str, BinaryTask] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Verification:
    """Check a circuit on held-out prompts, beside random circuits of equal size.

    The numbers are kept in `circuit.verification`, and so in `circuit.json` once saved.

    Args:
        circuit: of `model`.
        model: the model it was cut out of.
        task: the task it was found for; its test split shares no template and no name with the
            prompts it was found with.
        prompts: held-out prompts, and training prompts for calibrations.
        random_circuits: of equal size at every site, for the controls and the interval of their
            mean; at least 2.
        subsets: random halves of the circuit, for completeness; of a random circuit one.
        supersets: random parts of the rest that are switched on beside the circuit.
        adversary_steps: of the ascent by which an adversary picks such a part on training prompts,
            three times from random ones; the worst is tried on held-out prompts. Of the random
            circuits, a few are attacked likewise; of those that alone have less skill than the
            check asks for, the skill alone is taken.
        stability_seeds: circuits to find from other seeds, as this one was found.
        reference: see [`find_circuit`]; used for those.
        others: circuits of other seeds, if they exist already; none are searched then.
        adversarial: prompts the mechanism may stumble over, by kind; those of
            `load_adversarial_tasks` if not given.
        seed: of every random choice.
        progress: show progress bars.

    Returns:
        A [`Verification`]: `.passed`, `.table()`, and `[name]` for one check with its value,
        control and threshold. The checks: sufficiency, necessity, completeness, transfer, pair KL,
        vocabulary KL, random supersets (mean and worst), adversarial superset, interchange and
        the logit difference it moves, in all and by layer (where prompts are as long as their
        counterfactuals), the loss under other ablations, agreement of attention (where the model
        can keep its weights), stability, adversarial (where there are such prompts).

    Raises:
        TaskNotLearnedError: the model does not solve the task, so there is nothing to check.
        ValueError: an empty circuit, one of another model, prompts longer than the context, or too
            few random circuits.
    """
    if random_circuits < 2:
        raise ValueError(
            f"random_circuits={random_circuits} was passed, but an interval needs at least 2."
        )
    if not len(circuit):
        raise ValueError(
            f"The circuit for {circuit.task!r} has no nodes, so there is nothing to verify; find "
            "one with a lower target_loss."
        )
    circuit.check_model(model)
    model = unwrapped(model)
    check_prompts_fit(model, task)
    with in_eval_mode(model):
        if others is None and stability_seeds > 0:
            seed_of_others = int(circuit.config.get("seed", 0)) + 1000
            config = PruningConfig.from_stored(
                circuit.config, num_seeds=stability_seeds, seed=seed_of_others
            )
            others = find_circuits(model, task, config, reference=reference, progress=progress)
        if adversarial is None:
            adversarial = load_adversarial_tasks(
                task.name,
                task.tokenizer,
                n=prompts,
                seed=seed,
                max_length=getattr(model.config, "max_position_embeddings", None),
            )
        suite = _Suite(
            model, task, prompts, subsets, supersets, adversary_steps, seed, others or (),
            adversarial,
        )  # fmt: skip
        generator = torch.Generator().manual_seed(seed)
        vocabulary = model.get_input_embeddings().num_embeddings
        controls = [random_circuit(circuit, generator, vocabulary) for _ in range(random_circuits)]
        bar = tqdm([circuit, *controls], "verifying", disable=not progress, leave=False)
        numbers, *of_controls = [
            suite.measure(c, real=c is circuit, attack=i <= _ATTACKED) for i, c in enumerate(bar)
        ]
    checks = []
    for name, value in numbers.items():
        kind, _, detail = name.partition(": ")
        threshold, at_least, meaning = _CHECKS[kind]
        if isinstance(threshold, str):
            threshold = circuit.config.get(threshold, 0.15)
        if detail in suite.adversarial:
            accuracy = binary_accuracy(suite.adversarial[detail][1])
            meaning = meaning.format(where=detail.replace("_", " "), accuracy=accuracy)
        elif detail:
            meaning = meaning.format(where=detail)
        control = mean_and_interval([m[name] for m in of_controls if name in m], seed)
        checks.append(Check(name, value, *control, threshold, at_least, meaning))
    verification = Verification(tuple(checks))
    circuit.verification = verification.numbers()
    return verification


def mean_and_interval(values: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """The mean, and the ends of its 95 % interval by bootstrap."""
    numbers = torch.tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    means = numbers[torch.randint(len(numbers), (2000, len(numbers)), generator=generator)].mean(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return numbers.mean().item(), low, high


def random_circuit(circuit: Circuit, generator: torch.Generator, vocabulary: int = 0) -> Circuit:
    """As many nodes at every site, and tokens out of a vocabulary of that size where the circuit
    names any, drawn at random; no edges are pruned."""
    nodes = {
        site: torch.randperm(len(circuit.means[site]), generator=generator)[: len(ids)].tolist()
        for site, ids in circuit.nodes.items()
    }
    tokens = None
    if circuit.tokens is not None:
        drawn = torch.randperm(vocabulary, generator=generator)
        tokens = sorted(drawn[: len(circuit.tokens)].tolist())
    return replace(
        circuit, nodes=nodes, tokens=tokens, calibration=Calibration(), scores={}, metrics={},
        kept_edges=None, edge_offsets={}, verification={},
    )  # fmt: skip


class _Suite:
    """What every candidate is measured on; the whole model is measured once."""

    def __init__(
        self,
        model: nn.Module,
        task: BinaryTask,
        prompts: int,
        subsets: int,
        supersets: int,
        adversary_steps: int,
        seed: int,
        others: Sequence[Circuit],
        adversarial: dict[str, BinaryTask],
    ):
        self.model, self.subsets, self.seed, self.others = model, subsets, seed, others
        self.supersets, self.adversary_steps = supersets, adversary_steps
        generator = torch.Generator().manual_seed(seed)
        self.seen = train = _some(task.tensors("train"), prompts, generator)
        self.test = _some(task.tensors("test"), prompts, generator)
        self.swaps = equally_long(task, prompts)
        self.whole = model_scores(model, train, self.test)
        self.model_loss = self._loss(self.whole.test, self.whole.calibration)
        self.model_accuracy = binary_accuracy(self.whole.test)
        if self.model_loss > 0.9 * GUESSING or self.model_accuracy <= 0.5:
            raise TaskNotLearnedError(
                f"The whole model reaches a loss of {self.model_loss:.3f} and an accuracy of "
                f"{self.model_accuracy:.1%} on the task {task.name!r}, hardly more than "
                "guessing, so no circuit of it can be checked; train the model longer."
            )
        if self.swaps is not None:
            self.interchange = Interchange(model, self.swaps, self.whole.calibration)
        self.other_ablations = OtherAblations(model, train, self.test, self.swaps)
        self.vocabulary = all_pair_logits(model, self.test, logits=next_token_logits)
        self.adversarial: dict[str, tuple[TaskTensors, torch.Tensor]] = {}
        for kind, adverse in adversarial.items():
            tensors = adverse.tensors("test")
            pairs = self.whole.calibration.pairs(all_pair_logits(model, tensors), tensors)
            self.adversarial[kind] = (tensors, pairs)

    def _loss(self, pairs: torch.Tensor, calibration: Calibration) -> float:
        """At most that of guessing: who does worse has no skill left to lose."""
        return min(GUESSING, binary_loss(calibration.pairs(pairs, self.test)).item())

    def measure(self, circuit: Circuit, real: bool, attack: bool) -> dict[str, float]:
        """All numbers of one candidate; nothing is calibrated to it. Random circuits, and the model
        without a part of itself, are calibrated as the whole model is. Only with `attack` does an
        adversary look for what breaks it, and is it ablated otherwise."""
        model, test = self.model, self.test
        calibration = circuit.calibration if real else self.whole.calibration
        with circuit.apply(model, calibrated=False):
            next_token = all_pair_logits(model, test, logits=next_token_logits)
            adverse = {k: all_pair_logits(model, t) for k, (t, _) in self.adversarial.items()}
        with circuit.apply(model, inverse=True):
            without = self._loss(all_pair_logits(model, test), self.whole.calibration)
        alone = calibration.pairs(next_token.gather(1, candidates(test)), test)
        whole = self.whole.calibration.pairs(self.whole.test, test)
        numbers = {
            "sufficiency": binary_loss(alone).item(),
            "necessity": (without - self.model_loss) / (GUESSING - self.model_loss),
            "completeness": self._incompleteness(circuit, calibration, self.subsets if real else 1),
            "transfer": self._skill(alone),
            "pair KL": pair_kl(alone.numpy(), whole.numpy()),
            "vocabulary KL": F.kl_div(
                calibration.logits(next_token).log_softmax(-1),
                self.vocabulary.log_softmax(-1),
                reduction="batchmean",
                log_target=True,
            ).item(),
        }
        skill = inf if real else numbers["transfer"]
        numbers |= self._beside_others(circuit, calibration, attack, skill)
        if self.swaps is not None:
            numbers |= self.interchange.measure(circuit, by_layer=attack)
        if attack:
            numbers |= self.other_ablations.losses(circuit, calibration)
            numbers |= self._attention_agreement(circuit)
        if self.others:
            shared = [jaccard(circuit, other) for other in self.others]
            numbers["stability"] = (
                mean_jaccard([circuit, *self.others]) if real else sum(shared) / len(shared)
            )
        for kind, (tensors, whole_pairs) in self.adversarial.items():
            answers = calibration.pairs(adverse[kind], tensors)
            numbers[f"adversarial: {kind}"] = agreement(answers.numpy(), whole_pairs.numpy())
            numbers[f"accuracy: {kind}"] = binary_accuracy(answers)
        return numbers

    def _skill(self, pairs: torch.Tensor) -> float:
        """How far above guessing, as a share of the model's."""
        return (binary_accuracy(pairs) - 0.5) / (self.model_accuracy - 0.5)

    def _beside_others(
        self, circuit: Circuit, calibration: Calibration, attack: bool, alone: float
    ) -> dict[str, float]:
        """Skill on held-out prompts with parts of the rest on, one part for all prompts; who has
        little `alone` is not attacked."""
        model, generator = self.model, torch.Generator().manual_seed(self.seed)
        keep, means = circuit.masks_and_means(model)
        widths = {site: len(mask) for site, mask in keep.items()}

        def skill(beside: dict[str, torch.Tensor]) -> float:
            with circuit.apply(model, calibrated=False, beside=beside):
                return self._skill(calibration.pairs(all_pair_logits(model, self.test), self.test))

        numbers = {}
        if self.supersets:
            # For a random circuit a few are enough: there is little skill to lose.
            drawn = range(self.supersets if attack else min(2, self.supersets))
            skills = [skill(random_superset(widths, generator)) for _ in drawn]
            numbers["random supersets"] = sum(skills) / len(skills)
            numbers["worst superset"] = min(skills)
        if self.adversary_steps and attack and alone < _CHECKS["adversarial superset"][0]:
            numbers["adversarial superset"] = alone  # nobody need be on for it to fail
        elif self.adversary_steps and attack:
            with hooked(circuit.edge_cuts(model)):
                worst = adversarial_superset(
                    GatedModel(model, means), trimmed(self.seen), keep, calibration.pairs,
                    generator, self.adversary_steps, restarts=3,
                )  # fmt: skip
            numbers["adversarial superset"] = skill(worst)
        return numbers

    @cached_property
    def _patterns(self) -> list[dict[int, torch.Tensor]] | None:
        """The whole model's attention on some held-out prompts; None if it keeps no weights."""
        layers = range(len(decoder_of(self.model).layers))
        try:
            return [attention_patterns(self.model, ids, layers) for ids in _prompts(self.test)]
        except ValueError:
            return None

    def _attention_agreement(self, circuit: Circuit) -> dict[str, float]:
        """Overlap of the patterns of the heads whose values the circuit has."""
        heads = value_heads(self.model, circuit.nodes)
        if not heads or self._patterns is None:
            return {}
        within = partial(circuit.apply, self.model, calibrated=False)
        overlaps = []
        for ids, whole in zip(_prompts(self.test), self._patterns, strict=True):
            alone = attention_patterns(self.model, ids, list(heads), within)
            overlaps += [overlap(alone[i][own], whole[i][own]) for i, own in heads.items()]
        return {"attention agreement": sum(overlaps) / len(overlaps)}

    def _incompleteness(self, circuit: Circuit, calibration: Calibration, halves: int) -> float:
        """Mean |loss(circuit without K) − loss(model without K)| over random halves K of it."""
        generator = torch.Generator().manual_seed(self.seed)
        masks = circuit.masks()
        gaps = []
        for _ in range(halves):
            removed = {
                site: mask & (torch.rand(len(mask), generator=generator) < 0.5)
                for site, mask in masks.items()
            }
            losses = []
            for keep, calibrated in (
                ({site: masks[site] & ~gone for site, gone in removed.items()}, calibration),
                ({site: ~gone for site, gone in removed.items()}, self.whole.calibration),
            ):
                with mean_ablated(self.model, keep, circuit.means):
                    losses.append(self._loss(all_pair_logits(self.model, self.test), calibrated))
            gaps.append(abs(losses[0] - losses[1]))
        return sum(gaps) / max(1, len(gaps))


def _prompts(tensors: TaskTensors, count: int = 24) -> list[list[int]]:
    rows = zip(tensors["input_ids"][:count], tensors["attention_mask"][:count], strict=True)
    return [ids[mask.bool()].tolist() for ids, mask in rows]


def _some(tensors: TaskTensors, count: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    rows = torch.randperm(len(tensors["target_ids"]), generator=generator)[:count]
    return task_rows(tensors, rows)
