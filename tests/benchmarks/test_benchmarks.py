"""The benchmarks run, compare what they say they compare, and end up in the report."""

import copy

import pytest
import torch

from benchmarks.speed import __main__ as benchmark
from benchmarks.speed import measure, projection, training_step, width
from benchmarks.speed.measure import Timing, interleaved, ratio, table
from benchmarks.speed.plain import (
    abs_topk_plain,
    plainly,
    project_plain_,
    random_sparse_model,
    sparse_matrices,
)
from hf_circuit_sparsity.modeling import modeling_circuitgpt
from hf_circuit_sparsity.modeling.abs_topk import abs_topk_reference
from hf_circuit_sparsity.modeling.configuration_circuitgpt import CircuitGPTConfig
from hf_circuit_sparsity.optim.projection import project_topk_reference_


def test_sides_take_turns_and_the_first_round_does_not_count():
    calls = []
    times = interleaved({n: lambda n=n: calls.append(n) for n in "ab"}, rounds=3)
    assert calls == list("ab") * 4
    assert all(len(t.seconds) == 3 for t in times.values())


def test_a_table_gives_median_range_and_ratio():
    slow, fast = Timing((0.03, 0.01, 0.02)), Timing((0.002, 0.004, 0.006))
    assert str(slow) == "20 (10–30)"
    assert ratio(slow, fast) == "5.0 ×"
    assert str(Timing((1.5,))) == "1500 (1500–1500)"
    assert table(("a", "b"), [(1, slow)]) == "| a | b |\n| --- | --- |\n| 1 | 20 (10–30) |"


def test_the_plain_side_computes_the_same():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 40, generator=generator)
    assert torch.equal(abs_topk_plain(x, 10), abs_topk_reference(x, 10))
    plain, reference = x.clone(), x.clone()
    project_plain_(plain, 50)
    project_topk_reference_(reference, 50)
    assert torch.equal(plain, reference)
    project_plain_(plain.copy_(x), 12, min_nonzeros=3)
    assert (plain.count_nonzero(1) >= 3).all()

    config = CircuitGPTConfig(n_layer=2, d_model=32, d_head=8, vocab_size=64, block_size=32)
    model = random_sparse_model(config, 0.1)
    for name, weight in sparse_matrices(model):
        assert 0.05 < weight.count_nonzero() / weight.numel() <= 0.1, name
    ids = torch.arange(20)[None]
    fast = modeling_circuitgpt.abs_topk
    with torch.no_grad():
        expected = model(ids).logits
        with plainly(model):
            assert model.config._attn_implementation == "eager"
            torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=0)
    assert modeling_circuitgpt.abs_topk is fast
    assert model.config._attn_implementation == "sdpa"


def test_all_ways_to_train_take_the_same_step():
    config = CircuitGPTConfig(n_layer=1, d_model=32, d_head=8, vocab_size=64, block_size=32)
    # Dense: of equal entries, as zeros are, torch.topk keeps any, and the gradient shows which.
    model = random_sparse_model(config, 1.0)
    batch = torch.arange(24).reshape(2, 12)
    steps = [
        training_step._Step(copy.deepcopy(model), batch, 1.0, plain, nonzeros)
        for plain, nonzeros in ((True, False), (False, False), (False, True))
    ]
    for step in steps:
        step()
    plain, *ours = (dict(step.model.named_parameters()) for step in steps)
    for other in ours:
        for name, p in other.items():
            torch.testing.assert_close(p, plain[name], atol=1e-6, rtol=0)
    assert any(not torch.equal(p, model.get_parameter(n)) for n, p in plain.items())


def test_the_report_holds_every_section_and_the_plot(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(width, "measure", lambda *_: _two_widths())
    monkeypatch.setattr(benchmark, "SECTIONS", (("One", projection), ("Two", width)))
    path = benchmark.run_benchmark(tmp_path / "new" / "report.md", quick=True, device="cpu")
    text = path.read_text(encoding="utf-8")
    assert text.startswith(f"# Benchmarks\n\n{measure.machine('cpu')}")
    assert "only show that everything runs" in text
    assert text.index("## One") < text.index("| 1/1000 |") < text.index("## Two")
    assert "![Time against width](width.png)" in text
    assert {p.name for p in path.parent.iterdir()} == {"report.md", "width.png"}
    with pytest.raises(ValueError, match="is a folder; pass the path of a Markdown file"):
        benchmark.run_benchmark(tmp_path)


def _two_widths():
    names = ("dense", "on the nonzeros", "linear layers, dense", "linear layers, on the nonzeros")
    return [(w, {n: Timing((w / 1e5, w / 9e4)) for n in names}, 24 * w * w, 100) for w in (64, 128)]


@pytest.mark.slow
def test_all_benchmarks_run_at_small_sizes(tmp_path):
    report = benchmark.run_benchmark(tmp_path / "report.md", quick=True, device="cpu")
    text = report.read_text(encoding="utf-8")
    for title, _ in benchmark.SECTIONS:
        assert f"## {title}" in text
