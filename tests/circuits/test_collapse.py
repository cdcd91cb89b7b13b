"""A circuit on its open nodes alone, against the hooks that ablate all others."""

import pytest
import torch

from hf_circuit_sparsity.circuits.ablation import (
    mean_ablated,
    mean_activations,
    node_sites,
    reference_means,
)
from hf_circuit_sparsity.circuits.collapse import Collapse
from hf_circuit_sparsity.circuits.edges import circuit_edges, site_weights
from hf_circuit_sparsity.circuits.gating import GatedModel, frozen_weights
from hf_circuit_sparsity.circuits.pruning import selector
from hf_circuit_sparsity.circuits.pruning.config import PruningConfig
from hf_circuit_sparsity.circuits.pruning.find import find_circuit, means_for
from hf_circuit_sparsity.circuits.task_scores import Calibration, task_rows, trimmed
from tests.circuits.planted import on_off_task, planted_model, reference_ids
from tests.conftest import sparsify
from tests.decoders.dense_models import DENSE, PARALLEL, circuitgpt

MODELS = {
    **DENSE,
    **PARALLEL,
    "circuitgpt, all of it": lambda: circuitgpt(
        afrac=0.25, sink=True, bias=True, d_pos_emb=8, sinusoidal_cat_pos_emb=True
    ),
    "circuitgpt on its nonzeros": lambda: sparsify(circuitgpt(), 0.1).to_sparse(),
}


def share_of(model, share: float, seed: int = 0, shut: tuple[str, ...] = ()):
    generator = torch.Generator().manual_seed(seed)
    sites = node_sites(model)
    keep = {s: torch.rand(site.width, generator=generator) < share for s, site in sites.items()}
    for site in shut:
        keep[site][:] = False
    return keep


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "shut",
    [
        (),
        ("h.0.mlp.resid_delta",),
        ("h.1.attn.resid_delta",),
        ("h.0.attn.act_in", "h.0.attn.q", "h.1.mlp.post_act"),
    ],
)
@torch.no_grad()
def test_logits_are_those_of_the_hooks(name, shut):
    model = MODELS[name]()
    ids = torch.randint(0, 64, (3, 12), generator=torch.Generator().manual_seed(0))
    means, keep = mean_activations(model, ids.flip(0)), share_of(model, 0.3, shut=shut)
    with mean_ablated(model, keep, means):
        expected = model(ids).logits
        with Collapse(model, keep, means).running():
            logits = model(ids).logits
        # Nodes that may be open and are not: what is collapsed may be more than the circuit.
        more = share_of(model, 0.1, seed=1, shut=shut)
        with Collapse(model, {s: keep[s] | more[s] for s in keep}, means).running():
            loose = model(ids).logits
        after = model(ids).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(loose, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(after, expected)
    assert not torch.allclose(model(ids).logits, expected, atol=1e-2)


@pytest.mark.parametrize("name", ["circuitgpt", "llama", "gpt2"])
@torch.no_grad()
def test_weights_of_shut_nodes_are_not_read(name):
    model = DENSE[name]()
    ids = torch.arange(12)[None]
    means, keep = mean_activations(model, ids.flip(0)), share_of(model, 0.3)
    with mean_ablated(model, keep, means):
        expected = model(ids).logits
        collapse = Collapse(model, keep, means)
        for matrix in site_weights(model):
            matrix.projection.module.weight.fill_(float("nan"))
        with collapse.running():
            torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_what_it_may_be_used_for():
    model = circuitgpt()
    means = {s: torch.zeros(site.width) for s, site in node_sites(model).items()}
    keep = share_of(model, 0.2)
    collapse = Collapse(model, keep, means)
    assert collapse.fits(keep)
    assert not collapse.fits({s: mask & False for s, mask in keep.items()})
    more = share_of(model, 0.2, seed=1)
    assert not collapse.fits({s: mask | more[s] for s, mask in keep.items()})


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"ablation": "zero"},
        {"freeze_norms": True},
        {"outside": "random"},
        {"outside": "adversarial", "selection_supersets": 2},
        {"interchange": 1.0, "interchange_depths": 1},
        {"ablation": "resample"},
    ],
    ids=str,
)
def test_candidates_lose_what_they_lose_by_hooks(monkeypatch, settings):
    model, task = planted_model(noise=0.3), on_off_task()
    rows = task.tensors("train")
    length = int(rows["attention_mask"].sum(1).mode().values)
    rows = trimmed(task_rows(rows, rows["attention_mask"].sum(1) == length))
    config = PruningConfig(target_loss=10.0, screen_prompts=0, **settings)
    train = {name: tensor[:32] for name, tensor in rows.items()}
    means = means_for(model, task, rows, reference_means(model, reference_ids()), config, False)
    candidates = [(share_of(model, share, seed=1), ()) for share in (0.2, 0.4)]
    cut = circuit_edges(model, {s: m.nonzero()[:, 0].tolist() for s, m in candidates[1][0].items()})
    losses = []
    for wide in (1024, 0):
        monkeypatch.setattr(selector, "_WIDE", wide)
        made = selector.Selector(model, train, means, Calibration(), config)
        losses.append([*made.losses(candidates), made.loss(candidates[1][0], cut[::2])])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize("settings", [{}, {"prune_edges": True}])
def test_a_search_that_collapses_finds_what_one_by_hooks_finds(monkeypatch, settings):
    model, task = planted_model(noise=0.03), on_off_task()
    config = PruningConfig(
        max_steps=10, batch_size=8, learning_rate=5e-2, selection_prompts=32, screen_prompts=0,
        **settings,
    )  # fmt: skip
    found, collapsed = [], []
    build = Collapse.__init__
    monkeypatch.setattr(
        Collapse, "__init__", lambda self, *args: (collapsed.append(1), build(self, *args))[1]
    )
    for wide in (1024, 0):
        monkeypatch.setattr(selector, "_WIDE", wide)
        assert not collapsed
        circuit = find_circuit(model, task, config, reference=reference_ids(), progress=False)
        found.append(circuit)
    assert collapsed and found[0] == found[1]


@pytest.mark.parametrize("name", ["circuitgpt", "llama", "gpt2"])
def test_gradients_by_open_gates_are_those_of_the_hooks(name):
    model = DENSE[name]()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 64, (4, 12), generator=generator)
    means, live = mean_activations(model, ids.flip(0)), share_of(model, 0.3)
    rows = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "target_ids": torch.arange(4),
        "counterfactual_target_ids": torch.arange(4, 8),
    }
    gated, gradients = GatedModel(model, means), []
    for collapse in (None, Collapse(model, live, means)):
        gates = {s: mask[None].float().requires_grad_() for s, mask in live.items()}
        with frozen_weights(model):
            if collapse is None:
                pairs = gated.run(rows, gates)
            else:
                with collapse.running():
                    pairs = gated.run(rows, gates)
            (pairs[:, 0] - pairs[:, 1]).sum().backward()
        gradients.append({s: gate.grad[0][live[s]] for s, gate in gates.items() if live[s].any()})
    for site, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][site], expected, rtol=1e-3, atol=1e-4, msg=site)
