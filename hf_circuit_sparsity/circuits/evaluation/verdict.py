"""What the checks of a circuit mean, in words."""

from collections.abc import Mapping

# Where the circuit was looked for again.
SEEDS, PROMPTS, WORDINGS = "other seeds", "other prompts", "other wordings"
# What is only reported, where the circuit was searched with prompts that mislead.
DISTRACTORS = "searched after distractors"
# What it means that a check failed. The first groups weigh most.
_MEANINGS = {
    "sufficiency": "alone it does not carry the task",
    "pair KL": "alone it does not answer as the model does",
    "transfer": "it fails on wordings that it was not found with",
    "necessity": "the model answers without it as well",
    "interchange": "swapped into the whole model, its nodes do not decide the answer",
    "logit difference moved": "swapped in, they move only a part of the way to the other answer",
    "completeness": "with parts removed it and the model differ, so something is missing from it",
    "random supersets": "it answers only while the rest of the model is silent",
    "adversarial superset": "some part of the model makes it fail when that is switched on",
    "adversary of equal size": "as many other nodes as it has can make it fail",
    "adversarial": "it and the model differ on prompts made to mislead the mechanism",
    "stability": "searches from other seeds or prompts find other nodes",
    "minimality": "some of its nodes do no more than nodes of the rest would",
    "vocabulary KL": "it tells two answers apart, and not what else the model might say",
}
# The first group in which a check failed, or was not made, decides.
_USES = (
    (("sufficiency", "pair KL", "transfer"), "Do not use it as an account of this task."),
    (
        ("necessity", "interchange", "logit difference moved"),
        "It can be read as one way to the answer, not as what the model does.",
    ),
    (
        (
            "completeness",
            "random supersets",
            "adversarial superset",
            "adversary of equal size",
        ),
        "It can be read as nodes that take part in the answer, not as all that decides it: what is "
        "said of it holds with the rest of the model fixed.",
    ),
    (
        ("adversarial", "stability"),
        "It can be read as a mechanism of the model on prompts like those of the task, not beyond, "
        "and perhaps as one of several.",
    ),
    (
        ("minimality",),
        "It can be read as holding the mechanism, and more than that.",
    ),
    (
        ("vocabulary KL",),
        "It can be read as what decides between the two answers on prompts of this task, not as "
        "what else the model says there.",
    ),
)
_ALL_HELD = (
    "It may be read as the model's mechanism on prompts of this task, as far as these checks see."
)


def verdict(verification: Mapping[str, Mapping[str, float]]) -> str:
    """One paragraph: what was tested, what held, what did not, and what the circuit is good for.

    Args:
        verification: as [`Circuit`] stores it; empty if the circuit was not verified. Numbers
            without a threshold are only reported, and count neither way.
    """
    bounded = {name: check for name, check in verification.items() if "threshold" in check}
    if not bounded:
        return "It was not verified: nothing is known of whether it is the model's mechanism."
    failed = [name for name, check in bounded.items() if not check.get("passed")]
    tested = {_kind(name) for name in bounded}
    missing = [kind for kind in _MEANINGS if kind not in tested]
    # The conclusion first: a page cuts what is very long.
    sentences = [
        f"{len(bounded) - len(failed)} of {len(bounded)} checks passed.",
        _use({_kind(name) for name in failed}, set(missing)),
    ]
    for name in failed:
        meaning = _MEANINGS.get(_kind(name))
        sentences.append(f"Failed: {name}{f' ({meaning})' if meaning else ''}.")
    if DISTRACTORS in verification:
        sentences.append(
            "It was searched with prompts after a finished example of the other answer, as one of "
            "the adversarial kinds has them, in other words."
        )
    if any(name.startswith("stability: ") for name in bounded):
        again = (f"stability: {kind}" for kind in (SEEDS, PROMPTS, WORDINGS))
        missing += [name for name in again if name not in bounded]
    if missing:
        sentences.append(f"Not tested: {', '.join(missing)}.")
    return " ".join(sentences)


def _use(failed: set[str], missing: set[str]) -> str:
    # A check that is unknown here and failed is no reason to believe in the circuit.
    if failed - set(_MEANINGS):
        return _USES[0][1]
    for kinds, use in _USES:
        if failed.intersection(kinds):
            return use
        if untested := [kind for kind in kinds if kind in missing]:
            return f"Without a test of {' and '.join(untested)}: {use[0].lower()}{use[1:]}"
    return _ALL_HELD


def _kind(name: str) -> str:
    return name.partition(": ")[0]
