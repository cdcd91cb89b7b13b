import pytest

from hf_circuit_sparsity.optim.schedules import (
    check_linear_density,
    geometric_density,
    linear_density,
    sharkfin,
)


def test_density_is_one_then_linear_then_the_target():
    def density(step):
        return linear_density(step, 0.2, 0.1, 0.5, 100)

    assert [density(step) for step in (0, 1, 10)] == [1.0, 1.0, 1.0]
    assert density(20) == pytest.approx(0.8)
    assert density(30) == pytest.approx(0.6)
    assert [density(step) for step in (50, 51, 100, 1000)] == [0.2] * 4


def test_last_step_is_exactly_at_the_target_even_if_it_is_where_the_descent_ends():
    assert linear_density(2, 1 / 7, 0.0, 1.0, 3) > 1 / 7
    assert linear_density(3, 1 / 7, 0.0, 1.0, 3) == 1 / 7
    assert geometric_density(3, 1 / 7, 1 / 2, 1.0, 3) == 1 / 7


def test_start_equal_to_end_is_a_jump():
    assert linear_density(4, 0.5, 0.5, 0.5, 10) == 1.0
    assert linear_density(5, 0.5, 0.5, 0.5, 10) == 0.5
    assert linear_density(1, 0.5, 0.0, 0.0, 10) == 0.5


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("target_density", value) for value in (0.0, 1.1, float("nan"))),
        *(("anneal_start", value) for value in (-0.1, 0.6)),
        ("anneal_end", 1.5),
        *(("total_steps", value) for value in (0, 2.5)),
    ],
)
def test_bad_values_are_named(name, value):
    good = {"target_density": 0.5, "anneal_start": 0.01, "anneal_end": 0.5, "total_steps": 9}
    with pytest.raises(ValueError, match=name):
        check_linear_density(**{**good, name: value})


def test_sharkfin():
    assert sharkfin(1.0) == 1.0
    assert sharkfin(1 / 64) == 8.0
    with pytest.raises(ValueError, match="density"):
        sharkfin(0)
