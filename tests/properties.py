"""Tests of what holds for all values, on a few values that are always the same."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

MANY = 50  # times as many examples under `slow`
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_SETTINGS = settings(
    derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
)
# Ties, zeros of both signs, the smallest and the largest of half precision.
_VALUES = st.sampled_from([0.0, -0.0, 0.0, 1.0, -1.0, 0.5, -2.0, 3.0, 6e-8, -6e4]) | st.floats(
    -4, 4, width=16
)


def holds_for(examples: int, **strategies: st.SearchStrategy) -> Callable[[Callable], Callable]:
    """Make a property a test, of so many examples, and of `MANY` times as many under `slow`."""

    def decorate(holds: Callable[..., None]) -> Callable[[int], None]:
        @pytest.mark.parametrize(
            "examples",
            [
                pytest.param(examples, id="few"),
                pytest.param(MANY * examples, id="many", marks=pytest.mark.slow),
            ],
        )
        def test(examples: int) -> None:
            settings(_SETTINGS, max_examples=examples)(given(**strategies)(holds))()

        test.__name__, test.__doc__ = holds.__name__, holds.__doc__
        return test

    return decorate


@st.composite
def matrices(draw: Any, least: int = 0, most: int = 9, dtypes: Any = DTYPES) -> Tensor:
    """Matrices of any shape, also without rows or columns, or of zeros alone."""
    rows, width = (draw(st.integers(least, most)) for _ in range(2))
    n = rows * width
    values = draw(st.lists(_VALUES, min_size=n, max_size=n) | st.just([0.0] * n))
    return (
        torch.tensor(values, dtype=torch.float64)
        .to(draw(st.sampled_from(dtypes)))
        .view(rows, width)
    )
