"""The faithfulness suite: the planted circuit passes all of it, wrong ones do not."""

from dataclasses import replace

import pytest
import torch

from hf_circuit_sparsity import Circuit, TaskNotLearnedError, verify_circuit
from hf_circuit_sparsity.circuits.evaluation import verification
from hf_circuit_sparsity.circuits.evaluation.verification import mean_and_interval, random_circuit
from tests.circuits.planted import (
    PLANTED_NODES,
    on_off_task,
    planted_circuit,
    planted_model,
    unable_model,
)


@pytest.fixture(scope="module")
def model():
    return planted_model()


def verify(circuit, model, task=None, **options):
    if "others" not in options:
        options["others"] = [planted_circuit(model)]
    options.setdefault("random_circuits", 6)
    options.setdefault("adversarial", {"other_rows": on_off_task(seed=9)})
    return verify_circuit(
        circuit, model, task or on_off_task(), prompts=80, progress=False, **options
    )


@pytest.fixture(scope="module")
def planted(model):
    circuit = planted_circuit(model)
    return circuit, verify(circuit, model)


def test_the_planted_circuit_passes_every_check(planted):
    _, verification = planted
    assert verification.passed, verification.table()
    assert [check.name for check in verification.checks] == [
        "sufficiency", "necessity", "completeness", "transfer", "pair KL", "vocabulary KL",
        "random supersets", "worst superset", "adversarial superset",
        "adversary of equal size", "interchange",
        "logit difference moved", "moved by layer: h.0", "moved by layer: h.1",
        "moved by layer, alone: h.0", "moved by layer, alone: h.1",
        "task-mean ablation", "zero ablation", "frozen norms", "resample ablation",
        "attention agreement", "minimality", "independence",
        "adversarial: other_rows", "accuracy: other_rows", "model accuracy: other_rows",
        "stability: other seeds",
    ]  # fmt: skip
    expected = {"sufficiency": 0, "interchange": 1, "transfer": 1, "stability: other seeds": 1}
    for name, value in expected.items():
        assert verification[name].value == pytest.approx(value, abs=0.02)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_random_circuit_of_equal_size_fails_every_check_but_the_report(model, planted, seed):
    circuit = random_circuit(planted[0], torch.Generator().manual_seed(seed))
    assert len(circuit) == len(planted[0])
    verification = verify(circuit, model)
    assert not verification.passed
    failed = {check.name for check in verification.checks if not check.passed}
    assert failed == {check.name for check in verification.checks if check.threshold is not None}


def test_random_circuits_have_random_tokens_where_the_circuit_names_some(planted):
    nodes, means = planted[0].nodes, planted[0].means
    fingerprint, mean = planted[0].model_fingerprint, torch.zeros(16)
    named = Circuit(nodes, means, "on_off", fingerprint, tokens=[3, 4], token_mean=mean)
    drawn = [random_circuit(named, torch.Generator().manual_seed(s), 16).tokens for s in range(4)]
    assert all(len(tokens) == 2 for tokens in drawn) and any(t != [3, 4] for t in drawn)
    assert random_circuit(planted[0], torch.Generator(), 16).tokens is None


def test_a_control_holds_none_of_the_circuit_while_there_are_other_nodes(planted):
    circuit = replace(planted[0], tokens=[3, 5, 7], token_mean=torch.zeros(8))
    for seed in range(4):
        drawn = random_circuit(circuit, torch.Generator().manual_seed(seed), 16, apart=True)
        assert not set(drawn.tokens) & set(circuit.tokens) and len(drawn.tokens) == 3
        for site, ids in circuit.nodes.items():
            left = len(circuit.means[site]) - len(ids)
            assert len(drawn.nodes[site]) == len(ids)
            assert len(set(drawn.nodes[site]) & set(ids)) == max(0, len(ids) - left)


def test_half_the_mechanism_and_idle_company_are_noticed(model):
    # Without the neurons' part nothing reaches the answer.
    half = {s: ids for s, ids in PLANTED_NODES.items() if s.startswith("h.0")}
    assert not verify(planted_circuit(model, nodes=half), model)["sufficiency"].passed
    # A circuit of everything is sufficient, yet no random circuit of its size is any worse.
    everything = {s: list(range(m.width)) for s, m in model.node_sites().items()}
    verification = verify(planted_circuit(model, nodes=everything), model)
    for name in ("sufficiency", "stability: other seeds", "minimality"):
        assert not verification[name].passed


def test_outcome_is_stored_and_shown(planted, tmp_path):
    circuit, verification = planted
    circuit.save_pretrained(tmp_path)
    again = Circuit.from_pretrained(tmp_path)
    assert again.verification == circuit.verification == verification.numbers()
    assert again.verification["necessity"]["passed"] == 1.0
    assert "threshold" not in again.verification["independence"]
    with pytest.raises(KeyError, match=r"no such check.*sufficiency"):
        verification["no such check"]
    for check in verification.checks:
        if check.name.startswith(
            "model accuracy"
        ):  # the whole model's: no circuit stands beside it
            assert check.control is None and check.threshold is None and check.value == 1.0
            continue
        assert check.control_low <= check.control <= check.control_high and check.as_good <= 1
        assert f"{check.control:.3f} ({check.control_low:.3f} to {check.control_high:.3f})" in (
            verification.table()
        )
    table = verification.table()
    assert len(table.splitlines()) == 2 + len(verification.checks)
    assert "pass" in table and "FAIL" not in table


def test_that_a_search_saw_distractors_is_shown(model, planted):
    circuit = replace(planted[0], config={**planted[0].config, "distractor_fraction": 0.5})
    shown = verify(circuit, model, random_circuits=2, others=[])
    assert shown["searched after distractors"].value == 0.5
    assert "| searched after distractors | 0.500 |" in shown.table()
    with pytest.raises(KeyError):
        planted[1]["searched after distractors"]


def test_the_interval_is_that_of_the_mean():
    mean, low, high = mean_and_interval([0.0, 1.0] * 50)
    assert mean == 0.5  # ± 1.96 times its standard error
    assert (low, high) == pytest.approx((0.5 - 0.098, 0.5 + 0.098), abs=0.01)
    assert mean_and_interval([3.0] * 5) == (3.0, 3.0, 3.0)


def test_what_is_not_learned_is_refused_before_the_searches(monkeypatch):
    def searched(*args, **kwargs):
        raise AssertionError("the searches began")

    monkeypatch.setattr(verification, "other_circuits", searched)
    unable = unable_model()
    with pytest.raises(TaskNotLearnedError, match="'on_off'"):
        verify(planted_circuit(unable), unable, others=None)


def test_bad_input(model):
    unable, short = unable_model(), planted_model()
    wide = planted_circuit(model)  # made for a wider model, but with this one's fingerprint
    wide.means["h.0.attn.v"] = torch.zeros(99)
    wide.nodes["h.0.attn.v"] = [90]
    cut_short = planted_circuit(short)
    short.config.block_size = 5
    for circuit, of_model, error, named in [
        (planted_circuit(model, nodes={}), model, ValueError, "target_loss"),
        (planted_circuit(unable), unable, TaskNotLearnedError, "'on_off'"),
        (planted_circuit(unable), model, ValueError, planted_circuit(model).model_fingerprint),
        (cut_short, short, ValueError, "max_length"),
        (wide, model, ValueError, r"means\['h\.0\.attn\.v'\]"),
    ]:
        with pytest.raises(error, match=named):
            verify(circuit, of_model, others=[])
    with pytest.raises(ValueError, match="random_circuits=1"):
        verify(planted_circuit(model), model, random_circuits=1)
