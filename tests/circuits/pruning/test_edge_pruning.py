"""Pruning single weights and token embeddings, and running a circuit without them."""

import json
from dataclasses import replace

import pytest
import torch

from hf_circuit_sparsity import Circuit, PruningConfig
from hf_circuit_sparsity.circuits.ablation import hooked, reference_means
from hf_circuit_sparsity.circuits.edges import circuit_edges, cut_offsets, edge_hooks
from hf_circuit_sparsity.circuits.pruning import selector as measuring
from hf_circuit_sparsity.circuits.pruning.selector import Selector
from hf_circuit_sparsity.circuits.pruning.shrink import drop_edges
from hf_circuit_sparsity.circuits.task_scores import Calibration, task_rows
from tests.circuits.planted import (
    OFF,
    ON,
    PLANTED_EDGES,
    PLANTED_NODES,
    on_off_task,
    planted_circuit,
    planted_model,
    reference_ids,
)
from tests.circuits.pruning.conftest import find

CONFIG = PruningConfig(
    max_steps=60, batch_size=16, learning_rate=1e-2, selection_prompts=100, screen_prompts=40
)


@pytest.fixture(scope="module")
def model():
    return planted_model()


@pytest.fixture(scope="module")
def means(model):
    return reference_means(model, reference_ids())


def keep_masks(model, nodes):
    return planted_circuit(model, nodes=nodes).masks()


@torch.no_grad()
def logits(model):
    return model(reference_ids()).logits


def test_cutting_is_setting_weights_to_zero_and_adding_to_biases(means):
    model = planted_model().double()
    cut = [e for e in circuit_edges(model, PLANTED_NODES) if e.source_site == "h.0.attn.v"]
    assert len(cut) == 1
    with hooked(edge_hooks(model, cut, cut_offsets(cut, means))):
        hooked_logits = logits(model)
    projection = model.transformer.h[0].attn.c_proj
    with torch.no_grad():
        projection.bias[3] += projection.weight[3, 5] * means.attended["h.0.attn.v"][5]
        projection.weight[3, 5] = 0.0
    torch.testing.assert_close(hooked_logits, logits(model))


def test_needless_edges_go_and_take_their_nodes_along(model, means):
    tensors = on_off_task().tensors("train")
    selector = Selector(model, task_rows(tensors, slice(100)), means, Calibration(), CONFIG)
    # Beside the planted nodes, others with small random weights between them and the planted.
    nodes = {site: [*ids, *(i for i in (8 if "mlp" in site else 1,) if i not in ids)]
             for site, ids in PLANTED_NODES.items()}  # fmt: skip
    before = circuit_edges(model, nodes)
    keep, cut = drop_edges(model, keep_masks(model, nodes), selector, progress=False)
    kept = {s: m.nonzero()[:, 0].tolist() for s, m in keep.items() if m.any()}
    left = {e.name for e in circuit_edges(model, kept)} - {e.name for e in cut}
    assert len(before) > 8 and left <= set(PLANTED_EDGES)
    assert selector.loss(keep, cut) <= selector.target


@pytest.mark.parametrize("room", [(1, 1), (1, 2**13), (256, 1), (1, 2**20)])
@pytest.mark.parametrize("outside", ["off", "random"])
def test_many_circuits_are_measured_as_one_by_one(model, means, monkeypatch, room, outside):
    config = replace(CONFIG, outside=outside)
    rows = task_rows(on_off_task().tensors("train"), slice(60))
    nodes = [(site, i) for site, ids in PLANTED_NODES.items() for i in ids]
    keeps = []
    for site, i in nodes:
        keeps.append(keep_masks(model, PLANTED_NODES))
        keeps[-1][site][i] = False
    one_by_one = Selector(model, rows, means, Calibration(), config)
    expected = [one_by_one.loss(keep, few=True) for keep in keeps]
    assert len({round(loss, 3) for loss in expected}) > 3
    monkeypatch.setattr(measuring, "_ROWS", room[0])
    monkeypatch.setattr(measuring, "_HIDDEN_STATE", room[1])
    together = Selector(model, rows, means, Calibration(), config)
    found = together.losses([(keep, ()) for keep in keeps], few=True)
    assert found == pytest.approx(expected, abs=1e-5)


@pytest.fixture(scope="module")
def pruned(model):
    return find(model, CONFIG, prune_edges=True, token_nodes=True)


def test_only_the_tokens_that_decide_are_kept(model, pruned):
    assert pruned.tokens and set(pruned.tokens) <= {ON, OFF}
    assert pruned.metrics["token_nodes"] == len(pruned.tokens)
    assert pruned.metrics["edges"] == len(pruned.kept_edges) == len(pruned.edges(model))
    assert pruned.metrics["circuit_loss"] <= 0.15
    # Without them the rest of the model cannot tell.
    assert pruned.metrics["ablated_accuracy"] == 0.5


def test_a_circuit_of_format_1_is_read(model, pruned, tmp_path):
    plain = Circuit(PLANTED_NODES, pruned.means, "on_off", pruned.model_fingerprint)
    plain.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "circuit.json").read_text())
    for name in ("kept_edges", "edge_offsets", "tokens", "verification"):
        del content[name]
    (tmp_path / "circuit.json").write_text(json.dumps({**content, "format_version": 1}))
    again = Circuit.from_pretrained(tmp_path)
    assert again.kept_edges is None and len(again.edges(model)) == len(PLANTED_EDGES)
