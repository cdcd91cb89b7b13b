"""Tests of hypotheses: nodes that do nothing are not needed, and what depends is seen to."""

import pytest
import torch

from hf_circuit_sparsity.circuits.ablation import mean_ablated
from hf_circuit_sparsity.circuits.evaluation import hypotheses
from hf_circuit_sparsity.circuits.evaluation.hypotheses import (
    _changes,
    independence_p_value,
    needed_share,
)
from hf_circuit_sparsity.circuits.gating import GatedModel
from hf_circuit_sparsity.circuits.task_scores import all_pair_logits, task_rows
from tests.circuits.planted import PLANTED_NODES, on_off_task, planted_circuit, planted_model


@pytest.mark.parametrize("idle", [0, 2, 12])
def test_idle_company_is_not_needed(idle):
    model, tensors = planted_model(), on_off_task().tensors("test")
    nodes = {site: list(ids) for site, ids in PLANTED_NODES.items()}
    free = [i for i in range(16) if i not in PLANTED_NODES["h.1.mlp.post_act"]]
    nodes["h.1.mlp.post_act"] += free[:idle]
    circuit = planted_circuit(model, nodes=nodes)
    share = needed_share(circuit, model, task_rows(tensors, slice(40)), torch.Generator())
    assert share == pytest.approx(6 / (6 + idle), abs=1.01 * (idle > 0) / (6 + idle))


def test_of_a_large_circuit_a_sample_of_its_nodes_is_tested(monkeypatch):
    """On average it is the share of all."""
    model, rows = planted_model(), task_rows(on_off_task().tensors("test"), slice(24))
    nodes = {site: list(ids) for site, ids in PLANTED_NODES.items()}
    nodes["h.1.mlp.post_act"] = list(range(16))
    circuit = planted_circuit(model, nodes=nodes)
    measured, changes = [], hypotheses._changes

    def counted(gated, keep, rows, tested):
        measured.append([node for node in tested if keep[node[0]][node[1]]])
        return changes(gated, keep, rows, tested)

    monkeypatch.setattr(hypotheses, "_changes", counted)
    whole = needed_share(circuit, model, rows, torch.Generator())
    monkeypatch.setattr(hypotheses, "_INSIDE", 10)
    generator = torch.Generator().manual_seed(0)
    some = [needed_share(circuit, model, rows, generator) for _ in range(20)]
    assert len(measured[0]) == len(circuit) == 21
    assert all(len(set(tested)) == 10 for tested in measured[1:])
    assert len({tuple(tested) for tested in measured[1:]}) > 10
    assert sum(some) / 20 == pytest.approx(whole, abs=0.1)


def test_what_a_node_does_is_what_plain_hooks_measure():
    model, rows = planted_model(noise=0.1), task_rows(on_off_task().tensors("test"), slice(24))
    circuit = planted_circuit(model)
    keep, means = circuit.masks_and_means(model)
    nodes = [("h.0.attn.v", 5), ("h.1.mlp.act_in", 2)]  # one that goes, one that is added
    changes = _changes(GatedModel(model, means), keep, rows, nodes)

    def difference(masks):
        with mean_ablated(model, masks, means):
            pairs = all_pair_logits(model, rows)
        return pairs[:, 0] - pairs[:, 1]

    for (site, i), change in zip(nodes, changes, strict=True):
        turned = {s: mask.clone() for s, mask in keep.items()}
        turned[site][i] = ~turned[site][i]
        expected = (difference(turned) - difference(keep)).abs().mean()
        torch.testing.assert_close(change, expected, rtol=1e-4, atol=1e-5)


def test_dependence_without_correlation_is_seen_and_independence_is_not_denied():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(150, generator=generator)
    other = torch.randn(150, generator=generator)
    assert independence_p_value(x, x.square(), generator) < 0.01
    assert independence_p_value(x, torch.zeros(150), generator) == 1.0
    p_values = [
        independence_p_value(other[torch.randperm(150, generator=generator)], x, generator)
        for _ in range(40)
    ]
    assert 0.3 < sum(p_values) / 40 < 0.7 and min(p_values) < 0.3
