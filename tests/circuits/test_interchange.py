"""Circuits that must answer as the whole model does while their nodes are swapped."""

from dataclasses import replace

import pytest
import torch

from benchmarks.findings.planted.mechanisms import plant
from hf_circuit_sparsity import BinaryTask, PruningConfig, find_circuit
from hf_circuit_sparsity.circuits.ablation import hooked_sites, recorded_sites, reference_means
from hf_circuit_sparsity.circuits.gating import GatedModel
from hf_circuit_sparsity.circuits.interchange import Swaps, disagreement, interchange_loss
from hf_circuit_sparsity.circuits.task_scores import pair_logits, task_rows
from tests.circuits.planted import on_off_task, planted_model

SHORT = PruningConfig(
    max_steps=60, batch_size=16, learning_rate=3e-2, node_penalty=3e-3, selection_prompts=96,
    screen_prompts=0, interchange_depths=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def leaking():
    """A head says 0.3 of the answer and goes with it 99 times in 100, beside the mechanism."""
    return plant("leaking 0.3", "circuitgpt", 0.0, 0)


def sites_and_rows(planted, n=6):
    widths = {site: len(mean) for site, mean in means_of(planted).items()}
    return widths, task_rows(planted.task.tensors("test"), slice(n))


def means_of(planted):
    return reference_means(planted.model, planted.reference).nodes


def gates_of(widths, nodes):
    gates = {site: torch.zeros(1, width, dtype=torch.bool) for site, width in widths.items()}
    for site, i in nodes:
        gates[site][0, i] = True
    return gates


@torch.no_grad()
def test_swapping_is_what_plain_hooks_do(leaking):
    means = means_of(leaking)
    widths, rows = sites_and_rows(leaking)
    generator = torch.Generator().manual_seed(0)
    gates = {s: torch.rand(1, w, generator=generator) < 0.5 for s, w in widths.items()}
    swapped = Swaps(widths, generator).spread(2)[1]
    gated = GatedModel(leaking.model, means)
    theirs = gated.counterfactual(rows)
    others = {n: rows[f"counterfactual_{n}"] for n in ("input_ids", "attention_mask")}
    with recorded_sites(leaking.model, widths) as recorded:
        leaking.model(**others)
    assert all(torch.equal(theirs[site], recorded[site]) for site in widths)

    def hook(site, alone):
        def run(module, args, output):
            taken = gates[site][0] & swapped.get(site, torch.zeros(widths[site], dtype=torch.bool))
            output = torch.where(taken, recorded[site], output)
            return torch.where(gates[site][0], output, means[site]) if alone else output

        return run

    for alone in (False, True):
        with hooked_sites(leaking.model, {site: hook(site, alone) for site in widths}):
            expected = pair_logits(leaking.model, rows)
        found = gated.interchanged(rows, gates, swapped, theirs, alone)
        torch.testing.assert_close(found, expected)


def test_the_mechanism_agrees_under_every_swap_and_what_goes_with_it_does_not(leaking):
    widths, rows = sites_and_rows(leaking, 64)
    gated = GatedModel(leaking.model, means_of(leaking))
    swaps = Swaps(widths, torch.Generator().manual_seed(0)).spread(4)
    decoys = leaking.truth.decoys
    # The last node of the mechanism turns the whole model, so that all nodes swapped tell nothing.
    bottleneck = ("h.1.attn.resid_delta", 29)
    assert bottleneck in leaking.truth.required

    def worst(nodes):
        gates = gates_of(widths, nodes)
        return max(interchange_loss(gated, rows, gates, swapped).item() for swapped in swaps)

    assert worst(leaking.truth.required) < 0.01
    assert worst(decoys) > 0.3
    assert worst(decoys | {bottleneck}) > 0.3


def test_a_search_that_swaps_finds_the_mechanism_and_not_what_goes_with_it(leaking):
    def found(config):
        circuit = find_circuit(
            leaking.model, leaking.task, config, reference=leaking.reference, progress=False
        )
        return {(site, i) for site, ids in circuit.nodes.items() for i in ids}

    assert found(SHORT) == leaking.truth.decoys
    assert found(replace(SHORT, interchange=1.0)) == leaking.truth.required


def test_depths_go_down_the_model_and_halves_make_a_whole():
    sites = ("h.0.attn.v", "h.0.attn.resid_delta", "h.0.mlp.act_in", "h.1.attn.v")
    swaps = Swaps(dict.fromkeys(sites, 8), torch.Generator().manual_seed(0))
    assert swaps.depths == [2, 3, 4]
    first, half, others, *_, last_half, _ = swaps.spread(5)
    assert list(first) == list(half) == list(sites[:2]) and list(last_half) == list(sites)
    assert all(first[site].all() and (half[site] ^ others[site]).all() for site in first)
    assert {len(swaps.draw()) for _ in range(40)} == {2, 3, 4}


def test_the_distance_is_none_between_equals_and_large_between_opposites():
    pairs = torch.tensor([[[2.0, 0.0], [0.0, 1.0]]])
    assert disagreement(pairs, pairs).item() == pytest.approx(0, abs=1e-6)
    assert disagreement(pairs, pairs.flip(-1)).item() > 0.7


@pytest.mark.parametrize("settings", [{"interchange": 1.0}, {"ablation": "resample"}])
def test_counterfactuals_of_other_lengths_are_refused_before_anything_is_measured(settings):
    pairs = [(("w1 on", " yes"), ("w1 w2 off", " no"))]
    task = BinaryTask.from_pairs("lengths", on_off_task().tokenizer, pairs, pairs)
    with pytest.raises(ValueError, match=next(iter(settings))):
        find_circuit(planted_model(), task, replace(SHORT, **settings))
