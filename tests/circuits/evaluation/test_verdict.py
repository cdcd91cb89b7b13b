"""The verdict on a circuit: what fails weighs, and what was not tested is not taken for passed."""

import pytest

from hf_circuit_sparsity.circuits.card import circuit_card
from hf_circuit_sparsity.circuits.evaluation.verdict import verdict
from tests.circuits.planted import full_circuit, planted_model

KINDS = (
    "sufficiency", "pair KL", "transfer", "necessity", "interchange", "completeness",
    "random supersets", "adversarial superset", "adversarial: other_rows", "stability",
)  # fmt: skip
BELIEVED = "It may be read as the model's mechanism"


def stored(*failed, without=()):
    checks = {
        name: {"value": 0.5, "threshold": 0.4, "passed": float(name not in failed)}
        for name in (*KINDS, *failed)
        if name not in without
    }
    return {**checks, "vocabulary KL": {"value": 9.0, "passed": 1.0}}


def test_only_what_was_tested_and_held_is_believed():
    assert verdict(stored()).startswith("10 of 10 checks passed. " + BELIEVED)
    for name in KINDS:
        failed, missing = verdict(stored(name)), verdict(stored(without=[name]))
        assert f"Failed: {name} (" in failed and BELIEVED not in failed
        assert failed.startswith("9 of 10")
        assert "Not tested: " + name.partition(":")[0] in missing and BELIEVED not in missing
    assert "Do not use it" in verdict(stored("a check of tomorrow"))


@pytest.mark.parametrize("others", [(), ("stability",), ("adversarial superset", "interchange")])
def test_the_weightiest_failure_decides(others):
    assert "Do not use it" in verdict(stored("sufficiency", *others))
    assert "not as what the model does" in verdict(stored("necessity", *others))


@pytest.mark.parametrize("numbers", [{}, {"vocabulary KL": {"value": 0.1, "passed": 1.0}}])
def test_without_checks_it_says_so(numbers):
    assert "not verified" in verdict(numbers) and "passed" not in verdict(numbers)


def test_the_card_says_it_and_escapes_names():
    hostile = "<script>x</script>| [a](b)"
    content = full_circuit(planted_model(), verification=stored(hostile)).to_dict()
    card = str(circuit_card({"": content}, repo_id="me/circuits"))
    assert "10 of 11 checks passed" in card and "Do not use it" in card
    assert "<script>" not in card and "[a](b)" not in card
