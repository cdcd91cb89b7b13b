import pytest

from hf_circuit_sparsity.optim.schedules import DensitySchedule, sharkfin


def test_density_is_one_then_linear_then_the_target():
    schedule = DensitySchedule(0.2, anneal_start=0.1, anneal_end=0.5, total_steps=100)
    assert [schedule.density(step) for step in (0, 1, 10)] == [1.0, 1.0, 1.0]
    assert schedule.density(20) == pytest.approx(0.8)
    assert schedule.density(30) == pytest.approx(0.6)
    assert [schedule.density(step) for step in (50, 51, 100, 1000)] == [0.2] * 4


def test_last_step_is_exactly_at_the_target_even_if_it_is_where_the_descent_ends():
    schedule = DensitySchedule(1 / 7, anneal_start=0.0, anneal_end=1.0, total_steps=3)
    assert schedule.density(2) > 1 / 7
    assert schedule.density(3) == 1 / 7


def test_start_equal_to_end_is_a_jump():
    schedule = DensitySchedule(0.5, anneal_start=0.5, anneal_end=0.5, total_steps=10)
    assert schedule.density(4) == 1.0
    assert schedule.density(5) == 0.5
    assert DensitySchedule(0.5, 0.0, 0.0, total_steps=10).density(1) == 0.5


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"target_density": 0.0}, "target_density"),
        ({"target_density": 1.1}, "target_density"),
        ({"target_density": float("nan")}, "target_density"),
        ({"target_density": 0.5, "anneal_start": -0.1}, "anneal_start"),
        ({"target_density": 0.5, "anneal_start": 0.6, "anneal_end": 0.5}, "anneal_start"),
        ({"target_density": 0.5, "anneal_end": 1.5}, "anneal_end"),
        ({"target_density": 0.5, "total_steps": 0}, "total_steps"),
        ({"target_density": 0.5, "total_steps": 2.5}, "total_steps"),
    ],
)
def test_bad_values_are_named(arguments, word):
    with pytest.raises(ValueError, match=word):
        DensitySchedule(**arguments)


def test_sharkfin():
    assert sharkfin(1.0) == 1.0
    assert sharkfin(1 / 64) == 8.0
    with pytest.raises(ValueError, match="density=0"):
        sharkfin(0)
