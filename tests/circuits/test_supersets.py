"""What stays on beside a circuit: drawn, or chosen by an adversary."""

from dataclasses import replace

import pytest
import torch

from hf_circuit_sparsity.circuits.ablation import mean_ablated, reference_means
from hf_circuit_sparsity.circuits.evaluation import suite
from hf_circuit_sparsity.circuits.evaluation.verification import verify_circuit
from hf_circuit_sparsity.circuits.gating import GatedModel
from hf_circuit_sparsity.circuits.pruning import selector
from hf_circuit_sparsity.circuits.pruning.config import PruningConfig
from hf_circuit_sparsity.circuits.pruning.find import find_circuit
from hf_circuit_sparsity.circuits.supersets import adversarial_superset, random_superset
from hf_circuit_sparsity.circuits.task_scores import (
    Calibration,
    all_pair_logits,
    binary_accuracy,
    binary_loss,
    pair_logits,
    task_rows,
)
from tests.circuits.planted import (
    PLANTED_NODES,
    full_circuit,
    on_off_task,
    planted_circuit,
    planted_model,
    reference_ids,
)

# Two neurons that say opposite things of the last word, loudly, and so nothing together.
LOUD = (1, 2)


@pytest.fixture
def loud():
    model = planted_model()
    with torch.no_grad():
        model.transformer.wte.weight[:, 6] = torch.tensor([2.0, -2.0]).repeat(8)
        for neuron, sign in zip(LOUD, (1.0, -1.0), strict=True):
            mlp = model.transformer.h[1].mlp
            mlp.c_fc.weight[neuron] = 0.0
            mlp.c_fc.weight[neuron, 6] = 1.5
            mlp.c_proj.weight[:, neuron] = 0.0
            mlp.c_proj.weight[4, neuron] = 6.0 * sign
    return model


def planted_masks(means):
    masks = {site: torch.zeros(len(mean), dtype=torch.bool) for site, mean in means.items()}
    for site, ids in PLANTED_NODES.items():
        masks[site][ids] = True
    return masks


def test_the_adversary_finds_what_breaks_a_circuit(loud):
    means = reference_means(loud, reference_ids())
    keep, test = planted_masks(means.nodes), on_off_task().tensors("test")
    seen = task_rows(on_off_task().tensors("train"), slice(64))
    with torch.no_grad():
        assert binary_accuracy(all_pair_logits(loud, test)) == 1.0
    outside = adversarial_superset(
        GatedModel(loud, means.nodes), seen, keep, lambda pairs, rows: pairs,
        torch.Generator().manual_seed(0), steps=8, restarts=3,
    )  # fmt: skip
    assert all(not (outside[site] & keep[site]).any() for site in keep)
    chosen = outside["h.1.mlp.post_act"]
    assert chosen[LOUD[0]] != chosen[LOUD[1]]

    def loss(beside):
        with mean_ablated(loud, {s: keep[s] | beside[s] for s in keep}, means.nodes):
            return float(binary_loss(all_pair_logits(loud, test)))

    nothing = {site: torch.zeros_like(mask) for site, mask in keep.items()}
    everything = {site: torch.ones_like(mask) for site, mask in keep.items()}
    assert loss(nothing) < 0.1 and loss(everything) < 0.1 and loss(outside) > 1.0
    assert all(p.grad is None for p in loud.parameters())
    assert all(p.requires_grad for p in loud.parameters())


def test_the_adversary_goes_on_from_what_it_is_given(loud):
    means = reference_means(loud, reference_ids())
    keep, seen = planted_masks(means.nodes), on_off_task().tensors("train")
    gated = GatedModel(loud, means.nodes)
    begin = {site: torch.zeros_like(mask) for site, mask in keep.items()}
    begin["h.1.mlp.post_act"][LOUD[0]] = True

    def attacked(*begun):
        return adversarial_superset(
            gated, task_rows(seen, slice(32)), keep, lambda pairs, _: pairs,
            torch.Generator().manual_seed(0), steps=0, restarts=0, begin=begun,
        )  # fmt: skip

    harmless = {site: torch.zeros_like(mask) for site, mask in keep.items()}
    found = attacked(harmless, begin)
    assert all(torch.equal(found[site], begin[site]) for site in begin)


@pytest.mark.parametrize("outside", ["adversarial", "random"])
def test_candidates_face_what_did_most_harm_before(loud, outside, monkeypatch):
    """Of many candidates some pass because the only attack was a weak one: such are not taken."""
    begun = []

    def recorded(*args, begin, **kwargs):
        begun.append(begin)
        return adversarial_superset(*args, begin=begin, **kwargs)

    monkeypatch.setattr(selector, "adversarial_superset", recorded)
    means = reference_means(loud, reference_ids())
    config = PruningConfig(outside=outside, selection_supersets=4, target_loss=1000.0)
    of = selector.Selector(loud, on_off_task().tensors("train"), means, Calibration(), config)
    keep = planted_masks(means.nodes)
    for _ in range(3):
        of.loss(keep)
    if outside == "random":
        assert not begun
        return
    assert begun[0] == [] and len(begun) == 3
    harm = [of._losses({s: (keep[s] | x[s])[None] for s in keep}, of._all)[0]
            for x in of._outside[:2]]  # fmt: skip
    assert begun[2] == [of._outside[harm.index(max(harm))]]


def test_the_adversary_attacks_a_circuit_with_its_tokens_and_edges_cut(monkeypatch):
    model, seen = planted_model(), []

    def recorded(gated, rows, keep, calibrated, *args, **kwargs):
        gates = {site: mask[None] for site, mask in keep.items()}
        with torch.no_grad():
            seen.append((calibrated(gated.run(rows, gates), rows), rows))
        return adversarial_superset(gated, rows, keep, calibrated, *args, **kwargs)

    monkeypatch.setattr(suite, "adversarial_superset", recorded)
    circuit = full_circuit(model, config={"target_loss": 0.15}, edge_offsets={})
    verify_circuit(
        circuit, model, on_off_task(), prompts=32, random_circuits=2, stability_seeds=0,
        adversarial={}, progress=False, adversary_steps=1,
    )  # fmt: skip
    answers, rows = seen[0]
    with circuit.apply(model), torch.no_grad():
        torch.testing.assert_close(answers, pair_logits(model, rows))


def test_a_circuit_that_the_rest_can_break_does_not_pass(loud):
    circuit = planted_circuit(loud, config={"target_loss": 0.15})
    checks = verify_circuit(
        circuit, loud, on_off_task(), prompts=64, random_circuits=4, stability_seeds=0,
        adversarial={}, progress=False,
    )  # fmt: skip
    failed = [check.name for check in checks.checks if not check.passed]
    assert failed == ["random supersets", "adversarial superset", "adversary of equal size"]
    # Random parts of the rest often have both neurons on, or neither; the adversary has one.
    assert checks["adversarial superset"].value < 0.1 < checks["random supersets"].value


def test_a_random_superset_has_the_share_that_was_asked_for():
    drawn = random_superset({"a": 20_000}, torch.Generator().manual_seed(0), share=0.3)
    assert drawn["a"].float().mean() == pytest.approx(0.3, abs=0.02)
    shares = [
        float(random_superset({"a": 500}, torch.Generator().manual_seed(s))["a"].float().mean())
        for s in range(40)
    ]
    assert min(shares) < 0.15 and max(shares) > 0.85


SEARCH = PruningConfig(
    max_steps=60, batch_size=16, learning_rate=3e-2, selection_prompts=128, screen_prompts=64,
    node_penalty=3e-3,
)  # fmt: skip


def test_the_search_takes_in_what_the_adversary_would_use(loud):
    circuit = find_circuit(
        loud, on_off_task(), replace(SEARCH, outside="adversarial"), reference=reference_ids(),
        progress=False,
    )  # fmt: skip
    for site, ids in PLANTED_NODES.items():
        assert set(ids) <= set(circuit.nodes[site])
    assert set(LOUD) <= set(circuit.nodes["h.1.mlp.post_act"])
    # None of it is left to the rest: a fresh adversary finds nothing.
    keep, test = circuit.masks(), on_off_task().tensors("test")
    outside = adversarial_superset(
        GatedModel(loud, circuit.means), test, keep, lambda pairs, rows: pairs,
        torch.Generator().manual_seed(1), steps=12, restarts=3,
    )  # fmt: skip
    with mean_ablated(loud, {s: keep[s] | outside[s] for s in keep}, circuit.means):
        assert binary_accuracy(all_pair_logits(loud, test)) == 1.0


@pytest.mark.parametrize("changes", [
    {"ablation": "zero"}, {"ablation": "task_mean"}, {"ablation": "resample"},
    {"freeze_norms": True}, {"objective": "kl"}, {"outside": "random", "num_seeds": 2},
])  # fmt: skip
def test_other_ways_to_ablate_find_the_planted_circuit(changes):
    circuit = find_circuit(
        planted_model(), on_off_task(), replace(SEARCH, **changes), reference=reference_ids(),
        progress=False,
    )  # fmt: skip
    assert circuit.metrics["circuit_loss"] < 0.15
    assert {s: ids for s, ids in circuit.nodes.items() if ids} == PLANTED_NODES


def test_an_adversary_of_few_nodes_picks_those_that_break_most(loud):
    means = reference_means(loud, reference_ids())
    keep, test = planted_masks(means.nodes), on_off_task().tensors("test")
    seen = task_rows(on_off_task().tensors("train"), slice(64))

    def chosen(most):
        outside = adversarial_superset(
            GatedModel(loud, means.nodes), seen, keep, lambda pairs, rows: pairs,
            torch.Generator().manual_seed(0), steps=12, restarts=6, most=most,
        )  # fmt: skip
        with mean_ablated(loud, {s: keep[s] | outside[s] for s in keep}, means.nodes):
            reached = float(binary_loss(all_pair_logits(loud, test)))
        return {(s, i) for s, m in outside.items() for i in m.nonzero()[:, 0].tolist()}, reached

    (none, quiet), (one, heard), (few, loudest) = chosen(0), chosen(1), chosen(6)
    assert not none and len(one) == 1 and len(few) == 6
    assert quiet < 0.1 < heard < loudest and loudest > 1.0
    for nodes in (one, few):  # one of the two, and not the other
        assert sum(("h.1.mlp.post_act", i) in nodes for i in LOUD) == 1
