"""Mechanisms of which it is known what they are: models, tasks and the nodes that solve them.

Each mechanism is written once, for every architecture, and has a task of its own. Prompts are as
long as their counterfactuals. Fillers differ between training and held-out prompts.
"""

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from hf_circuit_sparsity.circuits.ablation import ReferenceMeans, reference_means
from hf_circuit_sparsity.circuits.circuit import Circuit
from hf_circuit_sparsity.circuits.gating import GatedModel
from hf_circuit_sparsity.circuits.task_scores import all_pair_logits, model_scores
from hf_circuit_sparsity.modeling.fingerprint import model_fingerprint
from hf_circuit_sparsity.tasks.binary_task import BinaryTask

from .builder import FILLERS, LENGTH, WORDS, Builder, Match, Nodes, word_tokenizer

Prompt = list[str]
NOTHING: Nodes = frozenset()
PAIRS = 200


class Truth(NamedTuple):
    """Which nodes solve a task."""

    required: Nodes
    """The task cannot be solved without any one of them."""
    choices: tuple[tuple[Nodes, ...], ...] = ()
    """Of each of these, any one set of nodes suffices."""
    optional: Nodes = NOTHING
    """They belong to the mechanism, which works without them."""
    decoys: Nodes = NOTHING
    """They look as if they belonged to it, and do not."""

    @property
    def nodes(self) -> Nodes:
        """All that belong to the mechanism."""
        return self.required.union(self.optional, *(n for sets in self.choices for n in sets))

    def sufficient(self, choice: int = 0) -> Nodes:
        """The required nodes, and one set of each choice."""
        return self.required.union(*(sets[choice % len(sets)] for sets in self.choices))

    def precision_and_recall(self, found: Nodes) -> tuple[float, float]:
        """Of the nodes that were found.

        Of each choice only the set counts that was found most of. The other sets' nodes, and
        optional ones, count neither for nor against. The precision of nothing is 0.
        """
        best = (max(sets, key=lambda n: len(n & found) / len(n)) for sets in self.choices)
        true = self.required.union(*best)
        hits, counted = len(found & true), len(found - (self.nodes - true))
        return hits / counted if counted else 0.0, hits / len(true)


@dataclass(frozen=True)
class Planted:
    """A model with a mechanism in it.

    Attributes:
        name: of the mechanism.
        model: in eval mode.
        task: that the mechanism solves.
        truth: which nodes do.
        reference: token ids `(n, length)` for means, in which every word is equally frequent.
        correlation: of the decoys with the answer; None where there are none.
    """

    name: str
    model: PreTrainedModel
    task: BinaryTask
    truth: Truth
    reference: torch.Tensor
    correlation: float | None = None

    @cached_property
    def means(self) -> ReferenceMeans:
        """Of all nodes, over the reference."""
        return reference_means(self.model, self.reference)

    def circuit(self, nodes: Nodes) -> Circuit:
        """Some nodes as a circuit, whose logits are calibrated as the model's."""
        by_site: dict[str, list[int]] = {}
        for site, index in nodes:
            by_site.setdefault(site, []).append(index)
        scores = model_scores(self.model, self.task.tensors("train"), self.task.tensors("test"))
        return Circuit(
            nodes=by_site, means=self.means.nodes, task=self.task.name,
            model_fingerprint=model_fingerprint(self.model), calibration=scores.calibration,
        )  # fmt: skip

    def swapped(self, nodes: Nodes) -> torch.Tensor:
        """Logits `(n, 2)` on held-out prompts, with nodes as they are in the counterfactual.

        All the rest of the model is left as it is: interchange into the whole model.
        """
        gates = {s: torch.ones(1, len(m), dtype=torch.bool) for s, m in self.means.nodes.items()}
        for site, index in nodes:
            gates[site][0, index] = False
        gated = GatedModel(self.model, self.means.nodes, resample=True)
        return all_pair_logits(
            self.model, self.task.tensors("test"), logits=lambda _, rows: gated.run(rows, gates)
        )


class Prompts:
    """Draws prompts of one split."""

    def __init__(self, split: str, seed: int):
        self._random = random.Random(f"{split} {seed}")
        half = len(FILLERS) // 2
        self._fillers = FILLERS[:half] if split == "train" else FILLERS[half:]

    def places(self, count: int, width: int = 1, end: int = LENGTH - 1) -> list[int]:
        """Where so many phrases of equal width begin, in any order; before `end`."""
        free = end - count * width
        gaps = sorted(self._random.choices(range(free + 1), k=count))
        places = [gap + i * width for i, gap in enumerate(gaps)]
        self._random.shuffle(places)
        return places

    def fillers(self) -> Prompt:
        """A prompt that says nothing."""
        return self._random.choices(self._fillers, k=LENGTH)

    def pick(self, *options: object, weights: tuple[float, ...] | None = None):
        """One of them, at random."""
        return self._random.choices(options, weights)[0]


def _put(prompt: Prompt, at: Mapping[int, str]) -> Prompt:
    """The prompt with other words at some places."""
    return [at.get(i, word) for i, word in enumerate(prompt)]


# The mechanisms: what is written, and one pair of prompts, that whose answer is "yes" first.


def _induction(b: Builder) -> Truth:
    name, value, before, out = b.channels(4)
    b.embed(name, {"x": 1, "y": -1})
    b.embed(value, {"yes": 1, "no": -1})
    b.answer(out)
    nodes = b.head(0, name, before, look="previous")
    return Truth(nodes | b.head(1, value, out, look=Match(name, before)))


def _induction_pair(p: Prompts, i: int) -> tuple[Prompt, Prompt]:
    return _named(p, p.places(2, width=2), 1, {})


def _binding(b: Builder) -> Truth:
    name, value, at_is, at_value, out = b.channels(5)
    b.embed(name, {"x": 1, "y": -1})
    b.embed(value, {"yes": 1, "no": -1})
    b.answer(out)
    nodes = b.head(0, name, at_is, 1.0, "previous") | b.head(1, at_is, at_value, 1.0, "previous")
    return Truth(nodes | b.head(2, value, out, look=Match(name, at_value)))


def _binding_pair(p: Prompts, i: int) -> tuple[Prompt, Prompt]:
    first, second = p.places(2, width=3)
    return _named(p, [first, second], 2, {first + 1: "is", second + 1: "is"})


def _named(
    p: Prompts, places: list[int], after: int, between: Mapping[int, str]
) -> tuple[Prompt, Prompt]:
    """Two names, what they stand for so many tokens later, and at the end one of the names."""
    asked = p.pick("x", "y")
    first, second = places if asked == "x" else places[::-1]
    prompt = [p.pick(word, word, "yes", "no") for word in p.fillers()]  # some values of no name
    prompt = _put(prompt, {places[0]: "x", places[1]: "y", LENGTH - 1: asked, **between})
    return (
        _put(prompt, {first + after: "yes", second + after: "no"}),
        _put(prompt, {first + after: "no", second + after: "yes"}),
    )


def _composition(b: Builder) -> Truth:
    return Truth(_composed(b)[0])


def _composed(b: Builder) -> tuple[Nodes, int]:
    switch, mark, before, out = b.channels(4)
    b.embed(switch, {"on": 1, "off": -1})
    b.embed(mark, {"here": 1})
    b.answer(out)
    nodes = b.head(0, switch, before, look="previous")
    return nodes | b.head(1, before, out, look=Match(None, mark)), out


def _composition_pair(p: Prompts, i: int) -> tuple[Prompt, Prompt]:
    """What stands before "here" counts; two other switches do not."""
    before, *others = p.places(3, width=2)
    prompt = _put(p.fillers(), {before + 1: "here", **{o: p.pick("on", "off") for o in others}})
    return _put(prompt, {before: "on"}), _put(prompt, {before: "off"})


def _both_sides(b: Builder, bias: float, threshold: float) -> Truth:
    """Two heads that see a word each, and a neuron that adds up what they saw."""
    left, right, saw_left, saw_right, out = b.channels(5)
    b.embed(left, {"left": 2})
    b.embed(right, {"right": 2})
    b.answer(out, threshold)
    nodes = b.head(0, left, saw_left, 1.9) | b.head(0, right, saw_right, 1.9)
    return Truth(nodes | b.neuron(1, {saw_left: 3, saw_right: 3}, 3 * bias, out, 1.0))


_and = partial(_both_sides, bias=-5.95, threshold=1.8)
_or = partial(_both_sides, bias=-2.3, threshold=3.0)


def _and_pair(p: Prompts, i: int) -> tuple[Prompt, Prompt]:
    a, b = p.places(2)
    prompt = p.fillers()
    missing = p.pick((a,), (b,), (a, b), weights=(0.45, 0.45, 0.1))
    both = {a: "left", b: "right"}
    return _put(prompt, both), _put(prompt, {at: w for at, w in both.items() if at not in missing})


def _or_pair(p: Prompts, i: int) -> tuple[Prompt, Prompt]:
    a, b = p.places(2)
    prompt = p.fillers()
    said = p.pick({a: "left"}, {b: "right"}, {a: "left", b: "right"}, weights=(0.45, 0.45, 0.1))
    return _put(prompt, said), prompt


def _counting(b: Builder) -> Truth:
    tick, total, out = b.channels(3)
    b.embed(tick, {"tick": 1})
    b.answer(out, threshold=0.6)
    nodes = b.head(0, tick, total, 1.0)
    return Truth(nodes | b.neuron(1, {total: 4}, -4 * 4.37, out, 1.0))


def _counting_pair(p: Prompts, i: int) -> tuple[Prompt, Prompt]:
    """Three to five ticks are many, up to two are few."""
    places = p.places(5)
    prompt, many, few = p.fillers(), p.pick(3, 4, 5), p.pick(0, 1, 2)
    return (
        _put(prompt, dict.fromkeys(places[:many], "tick")),
        _put(prompt, dict.fromkeys(places[:few], "tick")),
    )


def _negation(b: Builder) -> Truth:
    switch, denial, denied, out = b.channels(4)
    b.embed(switch, {"on": 1, "off": -1})
    b.embed(denial, {"not": 1})
    b.answer(out)
    nodes = b.head(0, switch, out, 3.0) | b.head(0, denial, denied, 3.0)
    for sign in (1, -1):
        nodes |= b.neuron(1, {out: 2 * sign, denied: 2}, -2 * 5.95, out, -2.4 * sign)
    return Truth(nodes)


def _negation_pair(p: Prompts, i: int) -> tuple[Prompt, Prompt]:
    """ "on" and "off" say the opposite where there is a "not" anywhere."""
    at, denial = p.places(2)
    denied = i % 2 == 1
    prompt = _put(p.fillers(), {denial: "not"} if denied else {})
    pair = _put(prompt, {at: "on"}), _put(prompt, {at: "off"})
    return pair[::-1] if denied else pair


def _switch_neuron(b: Builder, seen: int, out: int) -> Nodes:
    b.answer(out, threshold=1.0)
    return b.neuron(1, {seen: 1}, 0.0, out, 1.0)


def _equal_paths(b: Builder) -> Truth:
    first, second, seen, out = b.channels(4)
    for channel in (first, second):
        b.embed(channel, {"on": 1, "off": -1})
    paths = b.head(0, first, seen, 1.5), b.head(1, second, seen, 1.5)
    return Truth(_switch_neuron(b, seen, out), choices=(paths,))


def _backup(b: Builder) -> Truth:
    """The first head answers; where it is silent, a neuron says what the second saw."""
    first, second, seen, out = b.channels(4)
    for channel in (first, second):
        b.embed(channel, {"on": 1})
    b.answer(out, threshold=1.0)
    main = b.head(0, first, out, 2.0)
    neuron = b.neuron(1, {seen: 1, out: -1}, -1.5, out, 1.5)
    off_switch = frozenset({("h.1.mlp.act_in", out)})
    spare = b.head(0, second, seen, 2.0) | (neuron - off_switch)
    return Truth(NOTHING, choices=((main, spare),), optional=off_switch)


def _switch(b: Builder) -> tuple[Nodes, int]:
    switch, seen, out = b.channels(3)
    b.embed(switch, {"on": 1, "off": -1})
    return b.head(0, switch, seen, 1.5) | _switch_neuron(b, seen, out), out


def _distractor(b: Builder) -> Truth:
    """Beside a switch the same for colours, whose end is not read."""
    nodes, _ = _switch(b)
    colour, seen, end = b.channels(3)
    b.embed(colour, {"red": 1, "blue": -1})
    decoys = b.head(0, colour, seen, 1.5)
    for sign in (1, -1):  # both colours alike, or the last norm would tell them apart
        decoys |= b.neuron(1, {seen: sign}, 0.0, end, sign)
    return Truth(nodes, decoys=decoys)


def _leak(b: Builder, leak: float) -> Truth:
    """Beside two heads that compose one that carries the colour straight to the answer, so much
    weaker."""
    truth, out = _composed(b)
    (colour,) = b.channels(1)
    b.embed(colour, {"red": 1, "blue": -1})
    return Truth(truth, decoys=b.head(0, colour, out, 2.0 * leak) - truth)


def _leak_pair(p: Prompts, i: int, correlation: float) -> tuple[Prompt, Prompt]:
    """As of a composition, and a colour that goes with the answer so often."""
    pair = _composition_pair(p, i)
    free = [at for at, word in enumerate(pair[0]) if word in FILLERS]
    return _coloured(pair, p.pick(*free), i, correlation)


def _cancelling(b: Builder) -> Truth:
    """Beside a switch two neurons that say opposite things of the colour, loudly."""
    nodes, out = _switch(b)
    colour, seen = b.channels(2)
    b.embed(colour, {"red": 1, "blue": -1})
    decoys = b.head(0, colour, seen, 1.5)
    for sign in (1, -1):
        decoys |= b.neuron(1, {seen: 1}, 0.0, out, 3.0 * sign)
    return Truth(nodes, decoys=decoys - nodes)


def _switch_pair(p: Prompts, i: int, correlation: float | None = None) -> tuple[Prompt, Prompt]:
    """A switch, and where a correlation is given, colours that go with it so often."""
    at, other = p.places(2)
    prompt = p.fillers()
    yes, no = _put(prompt, {at: "on"}), _put(prompt, {at: "off"})
    if correlation is None:
        return yes, no
    return _coloured((yes, no), other, i, correlation)


def _coloured(
    pair: tuple[Prompt, Prompt], at: int, i: int, correlation: float
) -> tuple[Prompt, Prompt]:
    # Evenly spread, so that the share is exact in every split.
    share = (1 + correlation) / 2
    agrees = int((i + 1) * share + 1e-9) > int(i * share + 1e-9)
    colours = ("red", "blue") if agrees else ("blue", "red")
    return _put(pair[0], {at: colours[0]}), _put(pair[1], {at: colours[1]})


class Mechanism(NamedTuple):
    """How one is planted."""

    write: Callable[[Builder], Truth]
    pair: Callable[[Prompts, int], tuple[Prompt, Prompt]]
    n_layers: int = 2
    correlation: float | None = None


def _beside(write: Callable[[Builder], Truth], correlation: float) -> Mechanism:
    return Mechanism(write, partial(_switch_pair, correlation=correlation), 2, correlation)


def _leaking(leak: float) -> Mechanism:
    return Mechanism(partial(_leak, leak=leak), partial(_leak_pair, correlation=0.99), 2, 0.99)


MECHANISMS: dict[str, Mechanism] = {
    "induction": Mechanism(_induction, _induction_pair),
    "and": Mechanism(_and, _and_pair),
    "or": Mechanism(_or, _or_pair),
    "composition": Mechanism(_composition, _composition_pair),
    "counting": Mechanism(_counting, _counting_pair),
    "negation": Mechanism(_negation, _negation_pair),
    "binding": Mechanism(_binding, _binding_pair, n_layers=3),
    "equal paths": Mechanism(_equal_paths, _switch_pair),
    "backup": Mechanism(_backup, _switch_pair),
    "distractor 0.7": _beside(_distractor, 0.7),
    "distractor 0.9": _beside(_distractor, 0.9),
    "distractor 0.99": _beside(_distractor, 0.99),
    **{f"leaking {leak:g}": _leaking(leak) for leak in (0.1, 0.3)},
    "cancelling parts": _beside(_cancelling, 0.0),
}


def plant(
    name: str, architecture: str = "circuitgpt", noise: float = 0.0, seed: int = 0
) -> Planted:
    """A mechanism in a new model.

    Args:
        name: a key of `MECHANISMS`.
        architecture: a key of `ARCHITECTURES`.
        noise: standard deviation of all weights that the mechanism does not use; those it uses are
            between 1 and 30.
        seed: of the noise, of the mechanism's places and of the prompts.
    """
    mechanism = MECHANISMS[name]
    builder = Builder(architecture, noise, seed, mechanism.n_layers)
    truth = mechanism.write(builder)
    generator = torch.Generator().manual_seed(seed)
    return Planted(
        name, builder.model, _task(name, mechanism, seed), truth,
        torch.randint(1, len(WORDS), (256, LENGTH), generator=generator), mechanism.correlation,
    )  # fmt: skip


def _task(name: str, mechanism: Mechanism, seed: int) -> BinaryTask:
    def pairs(split: str) -> Iterator[tuple[tuple[str, str], tuple[str, str]]]:
        prompts = Prompts(split, seed)
        for i in range(PAIRS):
            yes, no = (" ".join(prompt) for prompt in mechanism.pair(prompts, i))
            yield (yes, " yes"), (no, " no")

    return BinaryTask.from_pairs(
        name.replace(" ", "_"), word_tokenizer(WORDS), pairs("train"), pairs("test")
    )
