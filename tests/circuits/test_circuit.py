import json
import shutil
from dataclasses import replace
from xml.etree import ElementTree

import pytest
import torch

from hf_circuit_sparsity import ArtifactError, Circuit, plot_circuit
from hf_circuit_sparsity.circuits.ablation import mean_activations
from hf_circuit_sparsity.circuits.task_scores import (
    Calibration,
    all_pair_logits,
    binary_loss,
    fit_calibration,
)
from hf_circuit_sparsity.modeling.fingerprint import model_fingerprint
from tests.circuits.planted import (
    full_circuit,
    on_off_task,
    planted_circuit,
    planted_model,
    reference_ids,
    word_tokenizer,
)


@pytest.fixture
def circuit(model):
    """With a calibration, scores and a model's name; nothing but nodes pruned."""
    return full_circuit(model, kept_edges=None, edge_offsets={}, tokens=None, token_mean=None)


PLANTED_MEANS = mean_activations(planted_model(), reference_ids())


def logits(model, ids=None):
    with torch.no_grad():
        return model(reference_ids() if ids is None else ids).logits


def test_apply_ablates_everything_else_and_restores(model, circuit):
    before = logits(model)
    seen = {}
    for name in ("h.0.attn.v", "h.1.mlp.post_act"):
        # Registered first, so it sees what the site computed; the circuit's hook comes after it.
        model.node_sites()[name].register_forward_hook(
            lambda m, a, out, n=name: seen.__setitem__(n, out)
        )
    with circuit.apply(model) as inside:
        assert inside is model
        alone = logits(model)
        read = {}
        projection = model.transformer.h[1].mlp.c_proj
        handle = projection.register_forward_pre_hook(lambda m, a: read.__setitem__("x", a[0]))
        logits(model)
        handle.remove()
    neurons, mean = read["x"], circuit.means["h.1.mlp.post_act"]
    assert torch.equal(neurons[..., 7], seen["h.1.mlp.post_act"][..., 7])
    others = [i for i in range(16) if i != 7]
    assert torch.equal(neurons[..., others], mean[others].expand_as(neurons[..., others]))
    assert not torch.allclose(alone, before)
    assert torch.equal(logits(model), before)
    with pytest.raises(RuntimeError, match="inside"), circuit.apply(model):
        raise RuntimeError("inside")
    assert torch.equal(logits(model), before)


def test_calibration_scales_and_shifts(model, circuit):
    with circuit.apply(model, calibrated=False):
        plain = logits(model)
    with circuit.apply(model):
        calibrated = logits(model)
    expected = 1.5 * plain
    expected[..., 1] += 0.25
    expected[..., 2] -= 0.25
    torch.testing.assert_close(calibrated, expected)
    tensors = on_off_task().tensors("test")
    with circuit.apply(model, calibrated=False):
        pairs = circuit.calibration.pairs(all_pair_logits(model, tensors), tensors)
    with circuit.apply(model):
        torch.testing.assert_close(pairs, all_pair_logits(model, tensors))
    with circuit.apply(model, inverse=True):  # never calibrated
        assert binary_loss(all_pair_logits(model, tensors)) > 0.6


def test_fitted_calibration_is_the_optimum(model):
    tensors = on_off_task().tensors("train")
    pairs = all_pair_logits(model, tensors) * 0.1
    pairs[tensors["target_ids"] == 1, 0] += 0.7  # biased towards one answer
    pairs[tensors["target_ids"] == 2, 1] += 0.7
    pairs = pairs + 1.0 * torch.randn(pairs.shape, generator=torch.Generator().manual_seed(0))

    def loss(scale, shift):
        calibration = Calibration(scale, {1: shift / 2, 2: -shift / 2})
        return binary_loss(calibration.pairs(pairs, tensors)).item()

    fitted = fit_calibration(pairs, tensors)
    scale, shift = fitted.scale, fitted.shift[1] - fitted.shift[2]
    for d_scale, d_shift in [(0.1, 0), (-0.1, 0), (0, 0.1), (0, -0.1)]:
        assert loss(scale, shift) < loss(scale + d_scale * scale, shift + d_shift)


@pytest.mark.parametrize("made", [planted_circuit, full_circuit])
def test_round_trip(model, made, tmp_path):
    circuit = made(model)
    circuit.save_pretrained(tmp_path / "c")
    (tmp_path / "new").touch()  # with the rights that any new file gets
    modes = {path.name: path.stat().st_mode for path in (tmp_path / "c").iterdir()}
    names = ("circuit.json", "circuit.safetensors")
    assert modes == dict.fromkeys(names, (tmp_path / "new").stat().st_mode)
    again = Circuit.from_pretrained(tmp_path / "c")
    assert again.to_dict() == circuit.to_dict()
    for name in ("means", "scores"):
        stored, read = getattr(circuit, name), getattr(again, name)
        assert set(stored) == set(read)
        assert all(torch.equal(read[site], vector) for site, vector in stored.items())
    with circuit.apply(model):
        expected = logits(model)
    with again.apply(model):
        assert torch.equal(logits(model), expected)


def test_nodes_are_not_read_with_the_means_of_another_save(model, tmp_path):
    first, second = planted_circuit(model), full_circuit(model)
    first.save_pretrained(tmp_path / "c")
    second.save_pretrained(tmp_path / "new")
    # As after a save that was killed between its files.
    shutil.copy(tmp_path / "new" / "circuit.safetensors", tmp_path / "c")
    with pytest.raises(ArtifactError, match="not the one that circuit"):
        Circuit.from_pretrained(tmp_path / "c")
    second.save_pretrained(tmp_path / "c")
    assert Circuit.from_pretrained(tmp_path / "c").nodes == second.nodes


def test_a_circuit_for_another_model_is_refused(circuit):
    other = planted_model(seed=5)
    for attempt in (lambda: circuit.edges(other), lambda: circuit.apply(other).__enter__()):
        with pytest.raises(ValueError, match=r"\w{16} \(me/planted"):
            attempt()
    assert not any(site._forward_hooks for site in other.node_sites().values())


def _swap_two(weight):
    weight[0, 0], weight[3, 5] = weight[3, 5].clone(), weight[0, 0].clone()


@pytest.mark.parametrize(
    "change",
    [
        _swap_two,
        lambda w: torch._foreach_add_([w], 1.0),  # as optimizers write
        lambda w: w.data[3, 3].mul_(2),
        lambda w: w.numpy().__setitem__((2, 2), 7.0),
        lambda w: setattr(w, "data", w.data + 1),
        lambda w: w.set_(torch.zeros_like(w)),
    ],
)
def test_fingerprint_is_the_weights_and_notices_every_change(model, change):
    fingerprint = model_fingerprint(model)
    assert model_fingerprint(planted_model().to(torch.bfloat16)) == fingerprint
    before = {name: p.clone() for name, p in model.state_dict().items()}
    with torch.no_grad():
        change(model.lm_head.weight.requires_grad_(False))
    assert model_fingerprint(model) != fingerprint
    model.load_state_dict(before)
    assert model_fingerprint(model) == fingerprint


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"format_version": 99}, "format_version"),
        ({"nodes": []}, "nodes"),
        ({"nodes": {"h.0.attn.v": ["0"]}}, r"nodes\['h.0.attn.v'\]\[0\]"),
        ({"nodes": {"h.0.attn.v": [99]}}, "nodes.* 0 to 7"),
        ({"nodes": {"h.9.attn.v": [0]}}, r"'h\.9\.attn\.v'"),
        ({"task": 3}, "task"),
        ({"calibration": {"scale": "x", "shift": {}}}, r"calibration\['scale'\]"),
        ({"kept_edges": [["h.0.attn.v", 5]]}, r"kept_edges\[0\]"),
        ({"kept_edges": [["h.0.attn.v", 0, "h.0.attn.resid_delta", 9]]}, "kept_edges"),
        ({"edge_offsets": {"h.0.attn.v": {"-1": 0.5}}}, "edge_offsets"),
        ({"edge_offsets": {"h.0.attn.q": {"1": 0.5}}}, "edge_offsets"),
        ({"tokens": ["a"]}, r"tokens\[0\]"),
        ({"tokens": None}, "token_mean"),
        ({"verification": {"sufficiency": {"value": "high"}}}, "verification"),
    ],
)
def test_a_bad_field_is_refused_by_name(model, tmp_path, changes, named):
    full_circuit(model).save_pretrained(tmp_path)
    path = tmp_path / "circuit.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ArtifactError, match=named):
        Circuit.from_pretrained(tmp_path)


@pytest.mark.parametrize(("column", "points"), [("single", 234), ("double", 486)])
def test_plot_fits_a_paper_column(model, circuit, tmp_path, column, points):
    def plotted():
        path = tmp_path / "pictures" / "c.svg"
        return plot_circuit(circuit, path, model, word_tokenizer(), column=column).read_bytes()

    root = ElementTree.fromstring(plotted().decode())
    assert root.get("width") == f"{points}pt" and plotted() == plotted()
    # Text stays text: it can be searched and edited.
    text = "".join(root.itertext())
    for expected in ("on_off: 6 nodes, 4 edges", "head 1", "yes", "neuron"):
        assert expected in text
    assert column == "single" or ("+2.00" in text and "+3.00" in text)
    assert [p.name for p in (tmp_path / "pictures").iterdir()] == ["c.svg"]


def test_plot_takes_any_text_and_refuses_unknown_columns(model, circuit, tmp_path):
    circuit.task = "<script>$x_{$"
    circuit.example["prompt"] = "$\\frac{" * 3000
    text = plot_circuit(circuit, tmp_path / "c.svg", model).read_text()
    assert "&lt;script&gt;$x_{$" in text and len(text) < 100_000
    with pytest.raises(ValueError, match="column='wide'"):
        plot_circuit(circuit, tmp_path / "d.svg", model, column="wide")
    assert not (tmp_path / "d.svg").exists()


def test_an_empty_circuit_is_a_circuit(model, circuit, tmp_path):
    empty = Circuit({}, circuit.means, "on_off", circuit.model_fingerprint)
    assert len(empty) == 0 and empty.edges(model) == []
    empty.save_pretrained(tmp_path)
    assert len(Circuit.from_pretrained(tmp_path)) == 0
    picture = plot_circuit(empty, tmp_path / "empty.png", model)
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"metrics": {"circuit_loss": float("nan")}}, r"metrics\['circuit_loss'\]"),
        ({"task": "../../etc"}, "task"),
        ({"task": "a\nb"}, "task"),
        ({"means": {**PLANTED_MEANS, "h.0.attn.q": torch.full((8,), torch.inf)}}, r"q\[0\]"),
    ],
)
def test_what_could_not_be_read_back_is_not_written(circuit, tmp_path, changes, named):
    with pytest.raises(ArtifactError, match=named):
        replace(circuit, **changes).save_pretrained(tmp_path / "c")
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"means": {s: m for s, m in PLANTED_MEANS.items() if s != "h.1.attn.q"}}, "0 .* 8"),
        ({"means": {**PLANTED_MEANS, "h.1.attn.q": torch.zeros(9)}}, "9 .* 8"),
        ({"means": {**PLANTED_MEANS, "h.9.q": torch.zeros(8)}}, "8 .* 0"),
        ({"calibration": Calibration(1.0, {16: 1.0})}, "token 16"),
        ({"example": {"target_id": 99}}, "token 99"),
    ],
)
def test_a_circuit_that_lies_about_its_model_is_refused(model, circuit, changes, named):
    with pytest.raises(ValueError, match=named):
        replace(circuit, **changes).edges(model)
