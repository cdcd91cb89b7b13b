"""What a circuit, and every random circuit beside it, is measured on."""

from collections.abc import Mapping
from functools import cached_property, partial

import torch
from torch import nn
from torch.nn import functional as F

from ...decoders.decoder import decoder_of
from ...metrics.circuit_faithfulness.pair_agreement import agreement, pair_kl
from ...tasks.binary_task import BinaryTask
from ..ablation import at_the_answer, hooked, mean_ablated
from ..attention import attention_patterns, overlap, value_heads
from ..circuit import Circuit
from ..gating import GatedModel
from ..pruning.find import TaskNotLearnedError
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
from .hypotheses import independence_p_value, needed_share
from .interventions import Interchange, OtherAblations, equally_long

GUESSING = 0.6931  # nats; ln 2
# Below this share of the model's skill a circuit beside an adversary's choice has failed.
ADVERSARIAL_SKILL = 0.8
# Prompts: of random circuits, whose mean and spread do not need all; for the adversary; for what is
# done node by node.
_FEW, _ATTACK_ROWS, _TESTED = 96, 128, 24


class Suite:
    """What every candidate is measured on; the whole model is measured once."""

    def __init__(
        self,
        model: nn.Module,
        task: BinaryTask,
        means: Mapping[str, torch.Tensor],
        prompts: int,
        subsets: int,
        supersets: int,
        adversary_steps: int,
        seed: int,
        adversarial: dict[str, BinaryTask],
    ):
        self.model, self.subsets, self.seed = model, subsets, seed
        self.supersets, self.adversary_steps = supersets, adversary_steps
        generator = torch.Generator().manual_seed(seed)
        self.seen = train = _some(task.tensors("train"), prompts, generator)
        self.test = _some(task.tensors("test"), prompts, generator)
        self.means = means
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
        self.few = task_rows(self.test, slice(_FEW))
        self.adversarial: dict[str, tuple[TaskTensors, torch.Tensor]] = {}
        for kind, adverse in adversarial.items():
            tensors = adverse.tensors("test")
            pairs = self.whole.calibration.pairs(all_pair_logits(model, tensors), tensors)
            self.adversarial[kind] = (tensors, pairs)

    def _loss(self, pairs: torch.Tensor, calibration: Calibration) -> float:
        """At most that of guessing: who does worse has no skill left to lose."""
        rows = task_rows(self.test, slice(len(pairs)))
        return min(GUESSING, binary_loss(calibration.pairs(pairs, rows)).item())

    def vocabulary_kl(self, logits: torch.Tensor) -> float:
        """KL(model ‖ these) over all tokens, nats, on as many held-out prompts as are given.

        Neither is calibrated: the scale is fitted to the two candidates.
        """
        return F.kl_div(
            logits.log_softmax(-1),
            self.vocabulary[: len(logits)].log_softmax(-1),
            reduction="batchmean",
            log_target=True,
        ).item()

    @cached_property
    def silent_kl(self) -> float:
        """The same with every node ablated: what a circuit of nothing has."""
        nothing = {
            site: torch.zeros(len(mean), dtype=torch.bool) for site, mean in self.means.items()
        }
        with mean_ablated(self.model, nothing, self.means):
            logits = all_pair_logits(self.model, self.test, logits=next_token_logits)
        return self.vocabulary_kl(logits)

    def measure(self, circuit: Circuit, real: bool, attack: bool) -> dict[str, float]:
        """All numbers of one candidate; nothing is calibrated to it. Random circuits, and the model
        without a part of itself, are calibrated as the whole model is, and measured on fewer
        prompts. Only with `attack` is what takes long done: an adversary looks for what breaks it,
        it is ablated otherwise, its nodes are tested one by one."""
        model, test = self.model, self.test if real else self.few
        calibration = circuit.calibration if real else self.whole.calibration
        with circuit.apply(model, calibrated=False), at_the_answer(model):
            next_token = all_pair_logits(model, test, logits=next_token_logits)
            adverse = {
                kind: all_pair_logits(model, tensors if real else task_rows(tensors, slice(_FEW)))
                for kind, (tensors, _) in self.adversarial.items()
            }
        with circuit.apply(model, inverse=True), at_the_answer(model):
            rest = all_pair_logits(model, test)
        without = self._loss(rest, self.whole.calibration)
        alone = calibration.pairs(next_token.gather(1, candidates(test)), test)
        whole = self.whole.calibration.pairs(self.whole.test[: len(alone)], test)
        numbers = {
            "sufficiency": binary_loss(alone).item(),
            "necessity": (without - self.model_loss) / (GUESSING - self.model_loss),
            "completeness": self._incompleteness(circuit, calibration, real),
            "transfer": self._skill(alone),
            "pair KL": pair_kl(alone.numpy(), whole.numpy()),
            "vocabulary KL": self.vocabulary_kl(next_token),
        }
        numbers |= self._beside_others(circuit, calibration, real, attack, numbers["transfer"])
        if self.swaps is not None:
            numbers |= self.interchange.measure(circuit, by_layer=attack, few=not real)
        if attack:
            numbers |= self.other_ablations.losses(circuit, calibration, few=not real)
            numbers |= self._attention_agreement(circuit)
            generator = torch.Generator().manual_seed(self.seed)
            some = task_rows(test, slice(_TESTED))
            numbers["minimality"] = needed_share(circuit, model, some, generator)
            numbers["independence"] = independence_p_value(
                rest[:_FEW, 0] - rest[:_FEW, 1], whole[:_FEW, 0] - whole[:_FEW, 1], generator
            )
        for kind, (tensors, whole_pairs) in self.adversarial.items():
            some = slice(len(adverse[kind]))
            answers = calibration.pairs(adverse[kind], task_rows(tensors, some))
            numbers[f"adversarial: {kind}"] = agreement(answers.numpy(), whole_pairs[some].numpy())
            numbers[f"accuracy: {kind}"] = binary_accuracy(answers)
            if real:
                numbers[f"model accuracy: {kind}"] = binary_accuracy(whole_pairs)
        return numbers

    def _skill(self, pairs: torch.Tensor) -> float:
        """How far above guessing, as a share of the model's."""
        return (binary_accuracy(pairs) - 0.5) / (self.model_accuracy - 0.5)

    def _beside_others(
        self, circuit: Circuit, calibration: Calibration, real: bool, attack: bool, alone: float
    ) -> dict[str, float]:
        """Skill on held-out prompts with parts of the rest on, one part for all prompts; a
        random circuit of little skill `alone` is not attacked."""
        model, generator = self.model, torch.Generator().manual_seed(self.seed)
        test, seen = (self.test if real else self.few), task_rows(self.seen, slice(_ATTACK_ROWS))
        keep, means = circuit.masks_and_means(model)
        widths = {site: len(mask) for site, mask in keep.items()}

        def skill(beside: dict[str, torch.Tensor]) -> float:
            with circuit.apply(model, calibrated=False, beside=beside), at_the_answer(model):
                return self._skill(calibration.pairs(all_pair_logits(model, test), test))

        numbers = {}
        if self.supersets:
            # For a random circuit a few are enough: there is little skill to lose.
            drawn = range(self.supersets if real else min(2, self.supersets))
            skills = [skill(random_superset(widths, generator)) for _ in drawn]
            numbers["random supersets"] = sum(skills) / len(skills)
            numbers["worst superset"] = min(skills)
        adversaries = {"adversarial superset": None, "adversary of equal size": len(circuit)}
        for name, most in adversaries.items() if self.adversary_steps and attack else ():
            if not real and alone < ADVERSARIAL_SKILL:
                numbers[name] = alone  # nobody need be on for it to fail
                continue
            with hooked(circuit.edge_cuts(model)):
                worst = adversarial_superset(
                    GatedModel(model, means), trimmed(seen), keep, calibration.pairs,
                    generator, self.adversary_steps, restarts=2, most=most,
                )  # fmt: skip
            numbers[name] = skill(worst)
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

    def _incompleteness(self, circuit: Circuit, calibration: Calibration, real: bool) -> float:
        """Mean |loss(circuit without K) − loss(model without K)| over random halves K of it."""
        halves, test = (self.subsets, self.test) if real else (1, self.few)
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
                with mean_ablated(self.model, keep, circuit.means), at_the_answer(self.model):
                    losses.append(self._loss(all_pair_logits(self.model, test), calibrated))
            gaps.append(abs(losses[0] - losses[1]))
        return sum(gaps) / max(1, len(gaps))


def _prompts(tensors: TaskTensors, count: int = 24) -> list[list[int]]:
    rows = zip(tensors["input_ids"][:count], tensors["attention_mask"][:count], strict=True)
    return [ids[mask.bool()].tolist() for ids, mask in rows]


def _some(tensors: TaskTensors, count: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    rows = torch.randperm(len(tensors["target_ids"]), generator=generator)[:count]
    return task_rows(tensors, rows)
