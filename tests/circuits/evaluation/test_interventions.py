"""Circuits under other interventions: the numbers of plain hooks, and those of paths by halves."""

import pytest
import torch

from hf_circuit_sparsity import verify_circuit
from hf_circuit_sparsity.circuits.ablation import (
    ablation_hook,
    hooked_sites,
    recorded_sites,
    task_means,
)
from hf_circuit_sparsity.circuits.evaluation.interventions import (
    Interchange,
    OtherAblations,
    equally_long,
)
from hf_circuit_sparsity.circuits.task_scores import (
    Calibration,
    all_pair_logits,
    binary_loss,
    pair_logits,
)
from tests.circuits.planted import PLANTED_EDGES, on_off_task, planted_circuit, planted_model

CALIBRATION = Calibration(1.5, {1: 0.25, 2: -0.25})


@pytest.fixture(scope="module")
def model():
    return planted_model(noise=0.05)


def losses(circuit, model, task):
    train, test = task.tensors("train"), task.tensors("test")
    return OtherAblations(model, train, test, equally_long(task, 200)).losses(circuit, CALIBRATION)


@pytest.mark.parametrize("edges", [None, list(PLANTED_EDGES)[:3]])
def test_other_means_give_what_a_circuit_with_those_means_gives(model, edges):
    task = on_off_task()
    circuit = planted_circuit(model, kept_edges=edges)
    measured = losses(circuit, model, task)
    test = task.tensors("test")
    for name, means in [
        ("task-mean ablation", task_means(model, task.tensors("train")).nodes),
        ("zero ablation", {site: torch.zeros_like(m) for site, m in circuit.means.items()}),
    ]:
        other = planted_circuit(model, means=means, kept_edges=edges)
        with other.apply(model, calibrated=False):
            expected = binary_loss(CALIBRATION.pairs(all_pair_logits(model, test), test)).item()
        assert measured[name] == pytest.approx(expected, abs=1e-6)
    # An edge that was cut shuts the circuit off, whatever is done to the rest.
    assert (measured["resample ablation"] > 0.6) == (edges is not None)


def test_resampled_is_everything_else_taken_from_the_other_prompt(model):
    task, circuit = on_off_task(), planted_circuit(model)
    masks, test = circuit.masks(), task.tensors("test")
    pairs = []
    for row in range(len(test["target_ids"])):
        base = {name: tensor[[row]] for name, tensor in test.items()}
        source = {name: tensor[[row ^ 1]] for name, tensor in test.items()}
        with torch.no_grad(), recorded_sites(model, masks) as other:
            pair_logits(model, source)
            theirs = dict(other)
        hooks = {site: ablation_hook(masks[site], theirs[site]) for site in masks}
        with torch.no_grad(), hooked_sites(model, hooks):
            pairs.append(pair_logits(model, base))
    expected = binary_loss(CALIBRATION.pairs(torch.cat(pairs), test)).item()
    measured = losses(circuit, model, task)["resample ablation"]
    assert measured == pytest.approx(expected, abs=1e-5)


def test_frozen_norms_show_what_rescaling_made_up():
    """Without a loud channel the norm makes the circuit's own signal larger than it is."""
    loud, task = planted_model(), on_off_task()
    with torch.no_grad():  # it is as loud as its prompt says on or off, so its mean is small
        attention = loud.transformer.h[0].attn
        attention.c_attn.weight[2 * 8 + 6, 0] = 2.0
        attention.c_proj.weight[9, 6] = 12.0
    measured = losses(planted_circuit(loud), loud, task)
    with planted_circuit(loud).apply(loud, calibrated=False):
        alone = all_pair_logits(loud, task.tensors("test"))
    rescaled = binary_loss(CALIBRATION.pairs(alone, task.tensors("test"))).item()
    everything = {s: list(range(m.width)) for s, m in loud.node_sites().items()}
    whole = binary_loss(
        CALIBRATION.pairs(all_pair_logits(loud, task.tensors("test")), task.tensors("test"))
    ).item()
    of_all = losses(planted_circuit(loud, nodes=everything), loud, task)
    assert of_all["frozen norms"] == pytest.approx(whole, abs=1e-5)
    assert measured["frozen norms"] > rescaled + 0.02, (measured, rescaled, whole)


def two_paths():
    """The planted model whose second layer does everything twice."""
    model = planted_model(noise=0.0)
    with torch.no_grad():
        layer = model.transformer.h[1]
        layer.mlp.c_fc.weight[8, 3] = layer.mlp.c_fc.weight[7, 3]
        layer.mlp.c_fc.bias[8] = layer.mlp.c_fc.bias[7]
        layer.mlp.c_proj.weight[4, 8] = layer.mlp.c_proj.weight[4, 7]
        layer.mlp.c_proj.weight[4, [7, 8]] *= 0.5
    return model


def test_one_path_of_two_moves_half_and_both_move_all():
    model, swaps = two_paths(), equally_long(on_off_task(), 200)

    def moved(*neurons):
        nodes = {"h.1.mlp.post_act": list(neurons)}
        circuit = planted_circuit(model, nodes=nodes)
        numbers = Interchange(model, swaps, Calibration()).measure(circuit, by_layer=True)
        assert numbers["moved by layer: h.1"] == numbers["logit difference moved"]
        return numbers

    assert moved(7)["logit difference moved"] == pytest.approx(0.5, abs=0.01)
    assert moved(7, 8)["logit difference moved"] == pytest.approx(1.0, abs=0.01)
    assert moved(7, 8)["interchange"] == 1.0
    assert moved(3)["logit difference moved"] == pytest.approx(0.0, abs=0.01)
    assert moved(3)["interchange"] == 0.0


def test_by_layer_names_every_layer_of_the_circuit(model):
    task = on_off_task()
    verification = verify_circuit(
        planted_circuit(model), model, task, prompts=40, others=[], adversarial={},
        random_circuits=2, progress=False,
    )  # fmt: skip
    layers = [c.name for c in verification.checks if c.name.startswith("moved by layer")]
    kinds = ("moved by layer", "moved by layer, alone")
    assert layers == [f"{kind}: h.{layer}" for kind in kinds for layer in (0, 1)]
    assert all(verification[name].value > 0.9 for name in layers)
    assert all(abs(verification[name].control) < 0.5 for name in layers)
