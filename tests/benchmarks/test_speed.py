"""The speed benchmarks compare what they say they compare, and end up in the report."""

import copy
import sys

import pytest
import torch

from benchmarks.experiment import Experiment, stored, table
from benchmarks.speed import __main__ as speed
from benchmarks.speed import circuits, growth, memory, rcd_memory, timing, training_step
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


def test_the_report_holds_every_section_and_picture_for_every_number_of_threads(
    tmp_path, monkeypatch
):
    pytest.importorskip("matplotlib")
    seen = []

    def one_size(shape, by_layer, *_):
        seen.append(torch.get_num_threads())
        seconds = (shape["d_model"] ** 2 / 1e5, shape["d_model"] ** 2 / 9e4)
        names = {**growth.STYLES, **(growth.LINEAR if by_layer else {})}
        times = {name: Timing(seconds) for name in names}
        return {"nonzeros": 100, "times": times, "shares": "attention 60 %, norm 30 %, rest 10 %"}

    monkeypatch.setattr(speed, "SECTIONS", {"One": speed.projection, "Two": growth, "3": circuits})
    monkeypatch.setattr(growth, "measure", one_size)
    argv = ["x", "--quick", "--results", str(tmp_path), "--threads", "1", "2"]
    monkeypatch.setattr(sys, "argv", argv)
    before = torch.get_num_threads()
    timing.main(speed.run, speed.__doc__, "speed", threads=(1,))
    assert torch.get_num_threads() == before and set(seen) == {1, 2}
    text = (tmp_path / "speed.md").read_text(encoding="utf-8")
    for count, part in enumerate(text.split(" thread(s)\n\n")[1:], 1):
        assert part.index("## One") < part.index("| 1/1000 |") < part.index("## Two")
        assert "| width | 2.00 (2.00) |" in part and "attention 60 %, norm 30 % |" in part
        assert "CircuitGPT, d_model 32" in part.split("## 3")[1]
        picture = f"speed_threads_{count}.png"
        assert f"![Time of a forward pass]({picture})" in part and (tmp_path / picture).is_file()


def test_what_grows_is_measured_on_the_same_model_both_ways():
    axis = growth.axes(quick=True)[0]
    found = growth.measure(axis.shape(64), True, "cpu", torch.float32, 1)
    assert set(found["times"]) == {*growth.STYLES, *growth.LINEAR} and found["nonzeros"] > 0
    assert "attention" in found["shares"]


def test_less_memory_is_held_where_zeros_are_left_out():
    plain, ours, compact = (
        memory.training(side, 64, 2, 4, 64, torch.get_num_threads())["held"]
        for side in memory.SIDES
    )
    assert plain == ours == compact > 0
    row = memory._rows({"d_model": "64"}, {"at once": {
        "plain": {"seconds": 2.0, "held": 1e6, "peak": 5e6},
        "ours": {"seconds": 1.0, "held": 1e6, "peak": 2e6},
    }})[1]  # fmt: skip
    assert row["plain / this"] == "2.5 ×" and row["plain / this, less held"] == "4.0 ×"


def test_training_on_nonzeros_holds_less():
    held = {side: rcd_memory.run_side(side, 32, 1, 2) for side in rcd_memory.SIDES}
    dense, whole, nonzeros = held.values()
    assert nonzeros["weights"] < whole["weights"] == dense["weights"]
    for kind in ("state", "gradients"):
        assert 0 < nonzeros[kind] <= whole[kind] < dense[kind]


@pytest.mark.slow
def test_all_benchmarks_run_at_small_sizes(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x", "--quick", "--results", str(tmp_path)])
    timing.main(speed.run, speed.__doc__, "speed", threads=(1,))
    assert all(f"## {title}" in (tmp_path / "speed.md").read_text() for title in speed.SECTIONS)
