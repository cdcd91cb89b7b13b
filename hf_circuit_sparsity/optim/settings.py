"""Checks of settings: a value out of range is refused in one sentence that names it."""

from typing import Any


def check(name: str, value: Any, holds: bool, expected: str) -> None:
    """Raise ValueError unless `holds`: which value was passed, and what was expected."""
    if not holds:
        raise ValueError(f"{name}={value!r} was passed: expected {expected}.")


def is_number(value: Any) -> bool:
    """Whether it is a number, NaN and infinity included."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_share(value: Any) -> bool:
    """Whether it is a number in (0, 1]."""
    return is_number(value) and 0 < value <= 1


def is_fraction(value: Any) -> bool:
    """Whether it is a number in [0, 1]."""
    return is_number(value) and 0 <= value <= 1


def is_whole(value: Any, least: int) -> bool:
    """Whether it is an int, and at least `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def check_density(density: Any) -> None:
    """Check the share of weights to keep."""
    check("density", density, is_share(density), "a share of weights in (0, 1], such as 1/64")
