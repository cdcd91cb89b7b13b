"""The verdict on a circuit: what fails weighs, and what was not tested is not taken for passed."""

import pytest

from hf_circuit_sparsity import Circuit
from hf_circuit_sparsity.circuits.card import circuit_card
from hf_circuit_sparsity.circuits.evaluation.verdict import verdict
from tests.circuits.planted import full_circuit, planted_model

KINDS = (
    "sufficiency", "pair KL", "transfer", "necessity", "interchange", "completeness",
    "random supersets", "adversarial superset", "adversarial: other_rows", "stability",
    "logit difference moved", "minimality", "vocabulary KL", "adversary of equal size",
)  # fmt: skip
BELIEVED = "It may be read as the model's mechanism"


def stored(*failed, without=()):
    checks = {
        name: {"value": 0.5, "threshold": 0.4, "passed": float(name not in failed)}
        for name in (*KINDS, *failed)
        if name not in without
    }
    return {**checks, "worst superset": {"value": 9.0, "passed": 1.0}}


def test_only_what_was_tested_and_held_is_believed():
    assert verdict(stored()).startswith("14 of 14 checks passed. " + BELIEVED)
    for name in KINDS:
        failed, missing = verdict(stored(name)), verdict(stored(without=[name]))
        assert f"Failed: {name} (" in failed and BELIEVED not in failed
        assert failed.startswith("13 of 14")
        assert "Not tested: " + name.partition(":")[0] in missing and BELIEVED not in missing
    assert "Do not use it" in verdict(stored("a check of tomorrow"))


def test_that_the_search_saw_prompts_that_mislead_is_said():
    searched = {**stored(), "searched after distractors": {"value": 0.5, "passed": 1.0}}
    assert "finished example of the other answer" in verdict(searched)
    assert "finished example" not in verdict(stored())


def test_where_a_circuit_was_not_looked_for_again_is_named():
    told = verdict({**stored(without=["stability"]), "stability: other seeds": {"threshold": 0.5}})
    assert "Not tested: stability: other prompts, stability: other wordings." in told


@pytest.mark.parametrize("others", [(), ("stability",), ("adversarial superset", "interchange")])
def test_the_weightiest_failure_decides(others):
    assert "Do not use it" in verdict(stored("sufficiency", *others))
    assert "not as what the model does" in verdict(stored("necessity", *others))


@pytest.mark.parametrize("numbers", [{}, {"worst superset": {"value": 0.1, "passed": 1.0}}])
def test_without_checks_it_says_so(numbers):
    assert "not verified" in verdict(numbers) and "passed" not in verdict(numbers)


def test_a_file_that_claims_more_than_its_numbers_is_not_believed(tmp_path):
    honest = {"value": 0.9, "control_low": 0.0, "control_high": 0.2, "at_least": 1.0}
    claims = {name: {**honest, "threshold": 0.5, "passed": 1.0} for name in KINDS}
    claims["necessity"]["threshold"] = 0.95  # not reached
    claims["interchange"]["control_high"] = 0.9  # no better than by chance
    claims["sufficiency"] |= {"at_least": 0.0, "control_low": 1.0}  # should be small
    del claims["stability"]["value"]
    claims["worst superset"] = {"value": 9.0, "passed": 1.0}  # has nothing to pass
    full_circuit(planted_model(), verification=claims).save_pretrained(tmp_path)
    read = Circuit.from_pretrained(tmp_path).verification
    wrong = {"necessity", "interchange", "sufficiency", "stability"}
    assert {name for name, check in read.items() if not check["passed"]} == wrong
    assert verdict(read).startswith("10 of 14 checks passed. Do not use it")
    again = full_circuit(planted_model(), verification=read)
    again.save_pretrained(tmp_path / "again")
    assert verdict(Circuit.from_pretrained(tmp_path / "again").verification) == verdict(read)


def test_the_card_says_it_and_escapes_names():
    hostile = "<script>x</script>| [a](b)"
    content = full_circuit(planted_model(), verification=stored(hostile)).to_dict()
    card = str(circuit_card({"": content}, repo_id="me/circuits"))
    assert "14 of 15 checks passed" in card and "Do not use it" in card
    assert "<script>" not in card and "[a](b)" not in card
