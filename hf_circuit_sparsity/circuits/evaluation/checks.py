"""The outcome of the faithfulness suite: numbers, thresholds, controls, a table."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import inf

from .verdict import verdict


def holds(numbers: Mapping[str, float]) -> bool:
    """Whether a check's value reaches its threshold and is better than the controls' interval.

    Args:
        numbers: `value`, `threshold` and, where there are such, `at_least`, `control_low` and
            `control_high`; files of before have the mean `control` alone.
    """
    value, threshold, control = numbers["value"], numbers["threshold"], numbers.get("control")
    if numbers.get("at_least"):
        high = numbers.get("control_high", -inf if control is None else control)
        return value >= threshold and value > high
    low = numbers.get("control_low", inf if control is None else control)
    return value <= threshold and value < low


@dataclass(frozen=True)
class Check:
    """One number about a circuit, and what it would have to be.

    Attributes:
        name: of the check.
        value: the circuit's.
        control: the mean over random circuits of equal size; None where there are none.
        control_low, control_high: the 95 % interval of that mean.
        as_good: the share of them whose value is at least as good.
        threshold: what the value must reach; None for a number that is only reported.
        at_least: whether it must be at least the threshold, or at most.
        meaning: what is measured, in a few words.
        low, high: where the value is a mean of several, its 95 % interval.
    """

    name: str
    value: float
    control: float | None
    control_low: float | None
    control_high: float | None
    as_good: float | None
    threshold: float | None
    at_least: bool
    meaning: str
    low: float | None = None
    high: float | None = None

    @property
    def passed(self) -> bool:
        """Whether the value reaches the threshold and is better than the controls' interval."""
        return self.threshold is None or holds(self.numbers())

    def numbers(self) -> dict[str, float]:
        """Its numbers as `circuit.json` stores them, without `passed`."""
        fields = {k: v for k, v in asdict(self).items() if k not in ("name", "meaning")}
        return {k: float(v) for k, v in fields.items() if v is not None}


@dataclass(frozen=True)
class Verification:
    """The outcome of [`verify_circuit`]."""

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    def __getitem__(self, name: str) -> Check:
        for check in self.checks:
            if check.name == name:
                return check
        names = ", ".join(check.name for check in self.checks)
        raise KeyError(f"There is no check {name!r}; there are {names}.")

    def verdict(self) -> str:
        """One paragraph: what held, what did not, and what the circuit may be used for."""
        return verdict(self.numbers())

    def table(self) -> str:
        """All checks as a Markdown table."""
        lines = ["| check | circuit | random (95 % interval), as good | must be | | what it is |"]
        lines.append("| --- " * 6 + "|")
        for c in self.checks:
            bound, verdict = "", "–"
            if c.threshold is not None:
                bound = f"{'≥' if c.at_least else '≤'} {c.threshold:g}"
                verdict = "pass" if c.passed else "FAIL"
            own = _with_spread(c.value, c.low, c.high)
            random = _with_spread(c.control, c.control_low, c.control_high)
            random += "" if c.as_good is None else f", {c.as_good:.0%}"
            lines.append(f"| {c.name} | {own} | {random} | {bound} | {verdict} | {c.meaning} |")
        return "\n".join(lines)

    def numbers(self) -> dict[str, dict[str, float]]:
        """Check by check, as `circuit.json` stores it."""
        return {c.name: {**c.numbers(), "passed": float(c.passed)} for c in self.checks}


def _with_spread(value: float | None, low: float | None, high: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" + ("" if low is None else f" ({low:.3f} to {high:.3f})")
