"""Checks that would catch a wrong circuit, each beside random circuits of equal size.

Sufficiency, necessity and the sizes are those of Gao et al. 2025, section 2; completeness is
that of Wang et al. 2022 (arXiv 2211.00593, section 4); interchange is the intervention of Geiger et
al. 2021 (arXiv 2106.02997); ablation in other ways is asked for by Miller et al. 2024 (arXiv
2407.08734).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations

import torch
from torch import nn
from tqdm.auto import tqdm

from ...tasks.adversarial import load_adversarial_tasks
from ...tasks.binary_task import BinaryTask
from ..ablation import ReferenceTokens, measuring, reference_input_ids, unwrapped
from ..circuit import Circuit
from ..pruning.config import PruningConfig
from ..pruning.find import check_prompts_fit
from ..task_scores import Calibration
from .alternatives import fabricated_circuits, other_circuits
from .checks import Check, Verification
from .suite import ADVERSARIAL_SKILL, Suite
from .verdict import DISTRACTORS, SEEDS

_ATTACKED = 4  # random circuits that what takes long is done to: an adversary, other ablations
# Threshold (a string is looked up for the circuit), whether it must be at least that, and meaning.
_CHECKS: dict[str, tuple[float | str | None, bool, str]] = {
    "sufficiency": ("target_loss", False, "loss of the circuit alone, nats"),
    "necessity": (0.5, True, "share of the model's skill that goes with the circuit"),
    "completeness": (0.2, False, "loss of circuit and model without random parts, difference"),
    "random supersets": (0.8, True, "skill with random parts of the rest on, mean; of the model's"),
    "worst superset": (None, True, "the least of those"),
    "adversarial superset": (
        ADVERSARIAL_SKILL,
        True,
        "skill with the part of the rest on that an adversary picks",
    ),
    "adversary of equal size": (
        ADVERSARIAL_SKILL,
        True,
        "the same if it may pick as many nodes as the circuit has",
    ),
    "interchange": (0.75, True, "answers that flip when only its nodes see the other prompt"),
    "logit difference moved": (0.8, True, "by those nodes, of the way to the other prompt's"),
    "moved by layer": (None, True, "by those of {where} alone"),
    "moved by layer, alone": (None, True, "the same while the circuit runs alone"),
    "transfer": (0.9, True, "skill on unseen templates, as a share of the model's"),
    "pair KL": ("target_loss", False, "model's answer against the circuit's, of two candidates"),
    "vocabulary KL": ("half_silent", False, "model's next token against the circuit's"),
    "minimality": (0.9, True, "nodes that do more than 19 of 20 nodes of the rest would, added"),
    "independence": (None, True, "p-value: answers without it tell nothing of the model's"),
    "task-mean ablation": (None, False, "loss alone, the rest at its mean on the task's prompts"),
    "zero ablation": (None, False, "loss alone, the rest at zero"),
    "resample ablation": (None, False, "loss alone, the rest as in the counterfactual prompt"),
    "frozen norms": (None, False, "loss alone, norms dividing as in the whole model"),
    "attention agreement": (None, True, "its heads' patterns, circuit alone against the model"),
    "stability": (0.5, True, "nodes shared with circuits from {where} (Jaccard)"),
    "fabricated nodes": (None, False, "that the search makes use of: {where}"),
    "fabricated loss": (None, False, "that it reaches on its own prompts: {where}"),
    "fabricated held-out loss": (None, False, "of the same: {where}"),
    "fabricated accuracy": (None, False, "on its own prompts, guessing is 0.5: {where}"),
    DISTRACTORS: (None, True, "share of the searched prompts with the other answer before"),
    "adversarial": (0.75, True, "agreement with the model where {where}"),
    "accuracy": (None, True, "right where {where}"),
    "model accuracy": (None, True, "the whole model there"),
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
    others: Sequence[Circuit] | Mapping[str, Sequence[Circuit]] | None = None,
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
            mean; at least 2. They hold none of the circuit's nodes, as far as the others suffice.
        subsets: random halves of the circuit, for completeness; of a random circuit one.
        supersets: random parts of the rest that are switched on beside the circuit.
        adversary_steps: of the ascent by which an adversary picks such a part on training prompts,
            twice from random ones, and again with no more nodes than the circuit has; the worst is
            tried on held-out prompts. Of the random circuits, a few are attacked likewise; of those
            that alone have less skill than the check asks for, the skill alone is taken.
        stability_seeds: circuits to find from other seeds, as many on other prompts and on other
            wordings, all as this one was found; and one each on a nonsense task and on the model
            with its weights shuffled, for what the search can make up. 0 for none of these.
        reference: see [`find_circuit`]; used for those.
        others: circuits of other seeds, or such by what is other, if they exist already; nothing
            is searched then.
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
        can keep its weights), minimality, independence, adversarial (where there are such
        prompts), stability, and what the search fabricates.

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
    with measuring(model):
        if adversarial is None:
            adversarial = load_adversarial_tasks(
                task.name,
                task.tokenizer,
                n=prompts,
                seed=seed,
                max_length=getattr(model.config, "max_position_embeddings", None),
            )
        # It refuses a model that has not learned the task, so it comes before the searches.
        suite = Suite(
            model, task, circuit.means, prompts, subsets, supersets, adversary_steps, seed,
            adversarial,
        )  # fmt: skip
        search = others is None and stability_seeds > 0
        if search:
            tokens = PruningConfig.from_stored(circuit.config).reference_tokens
            reference = reference_input_ids(model, task.tokenizer, reference, tokens, progress)
            others = other_circuits(circuit, model, task, stability_seeds, reference, progress)
        generator = torch.Generator().manual_seed(seed)
        vocabulary = model.get_input_embeddings().num_embeddings
        controls = [
            random_circuit(circuit, generator, vocabulary, apart=True)
            for _ in range(random_circuits)
        ]
        bar = tqdm([circuit, *controls], "verifying", disable=not progress, leave=False)
        numbers, *of_controls = [
            suite.measure(c, real=c is circuit, attack=i <= _ATTACKED) for i, c in enumerate(bar)
        ]
        bounds = {
            "target_loss": float(circuit.config.get("target_loss", 0.15)),
            "half_silent": suite.silent_kl / 2,
        }
        made = {}
        if search:
            made = fabricated_circuits(
                circuit, model, task, suite.whole.calibration, reference, progress
            )
    checks = []

    def add(
        name: str, values: Sequence[float], of_random: Sequence[float], **words: object
    ) -> None:
        kind = name if name in _CHECKS else name.partition(": ")[0]
        threshold, at_least, meaning = _CHECKS[kind]
        if isinstance(threshold, str):
            threshold = bounds[threshold]
        meaning = meaning.format(**words)
        value, *spread = values
        if len(values) > 1:
            value, *spread = mean_and_interval(values, seed)
        control: tuple = (None,) * 4
        if of_random:
            as_good = sum(v >= value if at_least else v <= value for v in of_random)
            control = (*mean_and_interval(of_random, seed), as_good / len(of_random))
        checks.append(Check(name, value, *control, threshold, at_least, meaning, *spread))

    for name, value in numbers.items():
        where = name.partition(": ")[2]
        of_random = [m[name] for m in of_controls if name in m]
        add(name, [value], of_random, where=where.replace("_", " "))
    if fraction := float(circuit.config.get("distractor_fraction", 0.0)):
        add(DISTRACTORS, [fraction], [])
    kinds = others if isinstance(others, Mapping) else {SEEDS: others or ()}
    for kind, of_kind in kinds.items():
        if of_kind:
            shared = [a.jaccard(b) for a, b in combinations([circuit, *of_kind], 2)]
            # Of these some share nodes with it by chance, as those of a search without merit would.
            drawn = [random_circuit(circuit, generator, vocabulary) for _ in controls]
            by_random = [sum(c.jaccard(o) for o in of_kind) / len(of_kind) for c in drawn]
            add(f"stability: {kind}", shared, by_random, where=kind)
    for kind, of_kind in made.items():
        for part, value in (
            ("nodes", of_kind.nodes), ("loss", of_kind.loss), ("held-out loss", of_kind.held_out),
            ("accuracy", of_kind.accuracy),
        ):  # fmt: skip
            add(f"fabricated {part}: {kind}", [float(value)], [], where=kind)
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


def random_circuit(
    circuit: Circuit, generator: torch.Generator, vocabulary: int = 0, apart: bool = False
) -> Circuit:
    """As many nodes at every site, and tokens out of a vocabulary of that size where the circuit
    names any, drawn at random; no edges are pruned.

    Args:
        circuit: whose size it has.
        generator: of the draw.
        vocabulary: tokens to draw from.
        apart: whether to take none of the circuit's own while there are others.
    """

    def draw(own: Sequence[int], of: int) -> list[int]:
        order = torch.randperm(of, generator=generator).tolist()
        if apart:
            order.sort(key=set(own).__contains__)  # the others stay in their order
        return order[: len(own)]

    nodes = {site: draw(ids, len(circuit.means[site])) for site, ids in circuit.nodes.items()}
    tokens = None if circuit.tokens is None else sorted(draw(circuit.tokens, vocabulary))
    return replace(
        circuit, nodes=nodes, tokens=tokens, calibration=Calibration(), scores={}, metrics={},
        kept_edges=None, edge_offsets={}, verification={}, names={}, notes={},
    )  # fmt: skip
