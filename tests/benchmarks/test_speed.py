"""The speed benchmarks compare what they say they compare, and end up in the report."""

import copy
import sys

import pytest
import torch

from benchmarks.experiment import Experiment, stored, table
from benchmarks.speed import __main__ as speed
from benchmarks.speed import circuits, rcd_memory, timing, training_step, width
from benchmarks.speed.plain import plainly, project_plain_, random_sparse_model
from benchmarks.speed.timing import Timing, interleaved, ratio
from hf_circuit_sparsity.modeling.configuration_circuitgpt import CircuitGPTConfig
from hf_circuit_sparsity.optim.projection import project_topk_reference_


def test_an_experiment_stores_what_it_measured_and_writes_its_report(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x", "--steps", "3", "--rates", "1", "2", "--name", "other"])
    calls = []

    def run(experiment):
        folder, options = experiment.folder, experiment.options
        for _ in range(2):
            found = stored(folder / "deep" / "x.json", lambda: calls.append(1) or {"a": 1.5})
        return table([{**found, "steps": options.steps, "rates": sum(options.rates)}])

    results = tmp_path / "results"
    Experiment.main(run, __doc__, "name", str(tmp_path), results, steps=1, rates=(0.5,))
    report = (results / "other.md").read_text(encoding="utf-8")
    assert report == "| a | steps | rates |\n| --- | --- | --- |\n| 1.5 | 3 | 3.0 |\n"
    assert len(calls) == 1


def test_sides_take_turns_and_the_first_round_does_not_count():
    calls = []
    times = interleaved({n: lambda n=n: calls.append(n) for n in "ab"}, rounds=3)
    assert calls == list("ab") * 4 and all(len(t.seconds) == 3 for t in times.values())
    assert str(Timing((0.03, 0.01, 0.02))) == "20 (10–30)"
    assert ratio(Timing((0.02,)), Timing((0.004,))) == "5.0 ×"


def test_all_ways_to_train_take_the_same_step():
    config = CircuitGPTConfig(n_layer=1, d_model=32, d_head=8, vocab_size=64, block_size=32)
    # Dense: of equal entries, as zeros are, torch.topk keeps any, and the gradient shows which.
    model = random_sparse_model(config, 1.0)
    batch = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        expected = model(batch).logits
        with plainly(model):
            torch.testing.assert_close(model(batch).logits, expected, atol=1e-5, rtol=0)
    steps = [
        training_step.TrainingStep(copy.deepcopy(model), batch, 1.0, plain, nonzeros)
        for plain, nonzeros in ((True, False), (False, False), (False, True))
    ]
    for step in steps:
        step()
    plain, *ours = (dict(step.model.named_parameters()) for step in steps)
    for other in ours:
        for name, p in other.items():
            torch.testing.assert_close(p, plain[name], atol=1e-6, rtol=0)
    assert any(not torch.equal(p, model.get_parameter(n)) for n, p in plain.items())
    weight = torch.randn(6, 40)
    reference = weight.clone()
    project_plain_(weight, 50)
    project_topk_reference_(reference, 50)
    assert torch.equal(weight, reference)


def test_the_report_holds_every_section_and_the_picture(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")

    def one_width(d_model, *_):
        times = {name: Timing((d_model / 1e5, d_model / 9e4)) for name in width.STYLES}
        return {"d_model": d_model, "entries": 24 * d_model**2, "nonzeros": 100, "times": times}

    monkeypatch.setattr(speed, "SECTIONS", {"One": speed.projection, "Two": width, "3": circuits})
    monkeypatch.setattr(width, "measure", one_width)
    monkeypatch.setattr(sys, "argv", ["x", "--quick", "--results", str(tmp_path)])
    timing.main(speed.run, speed.__doc__, "speed")
    text = (tmp_path / "speed.md").read_text(encoding="utf-8")
    assert text.index("## One") < text.index("| 1/1000 |") < text.index("## Two")
    assert "CircuitGPT, d_model 32" in text.split("## 3")[1]
    assert "![Time against width](speed.png)" in text and (tmp_path / "speed.png").is_file()


def test_training_on_nonzeros_holds_less():
    held = {side: rcd_memory.run_side(side, 32, 1, 2) for side in rcd_memory.SIDES}
    dense, whole, nonzeros = held.values()
    assert nonzeros["weights"] < whole["weights"] == dense["weights"]
    for kind in ("state", "gradients"):
        assert 0 < nonzeros[kind] <= whole[kind] < dense[kind]


@pytest.mark.slow
def test_all_benchmarks_run_at_small_sizes(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x", "--quick", "--results", str(tmp_path)])
    timing.main(speed.run, speed.__doc__, "speed")
    assert all(f"## {title}" in (tmp_path / "speed.md").read_text() for title in speed.SECTIONS)
