"""Several seeds at once, and searching the settings."""

import json

import pytest
import torch

from hf_circuit_sparsity.circuits.ablation import TOKENS, reference_means
from hf_circuit_sparsity.circuits.pruning.config import PruningConfig
from hf_circuit_sparsity.circuits.pruning.find import find_circuits, jaccard, mean_jaccard
from hf_circuit_sparsity.circuits.pruning.masks import learn_masks
from hf_circuit_sparsity.circuits.pruning.tune import search_circuit
from tests.circuits.planted import on_off_task, planted_model, reference_ids

SMALL = PruningConfig(
    max_steps=20, batch_size=8, learning_rate=1e-2, selection_prompts=60, screen_prompts=30
)


def with_settings(config=SMALL, **settings):
    return PruningConfig(**{**config.__dict__, **settings})


def test_seeds_learned_together_are_seeds_learned_one_by_one():
    model = planted_model()
    means = reference_means(model, reference_ids())
    tensors = on_off_task().tensors("train")
    everything = {**means.nodes, TOKENS: means.token}
    together = learn_masks(model, tensors, everything, SMALL, [3, 4, 5], progress=False)
    one_by_one = learn_masks(
        model, tensors, everything, with_settings(memory_gb=1e-9), [3, 4, 5], progress=False
    )
    for masks, others in zip(together, one_by_one, strict=True):
        for site, tau in masks.items():
            torch.testing.assert_close(tau, others[site], atol=1e-5, rtol=0)
    site = "h.0.attn.v"
    assert not torch.allclose(together[0][site], together[1][site])


def find(config):
    return find_circuits(
        planted_model(), on_off_task(), config, reference=reference_ids(),
        progress=False,
    )  # fmt: skip


def test_screening_leads_to_circuits_that_cannot_lose_a_node_either():
    (screened,), (thorough,) = find(SMALL), find(with_settings(screen_prompts=0))
    assert screened.nodes == thorough.nodes


def test_every_seed_has_its_circuit_and_says_so():
    circuits = find(with_settings(num_seeds=2, seed=7))
    assert [c.config["seed"] for c in circuits] == [7, 8]
    assert jaccard(circuits[0], circuits[0]) == 1
    assert 0 < mean_jaccard(circuits) <= 1


def search(folder, trials, config=SMALL):
    return search_circuit(
        planted_model(), on_off_task(), config, trials=trials, folder=folder,
        reference=reference_ids(), progress=False,
    )  # fmt: skip


def values(folder):
    lines = [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]
    return [
        (line["param_name"], line["param_value_internal"]) for line in lines if "param_name" in line
    ]


def test_a_search_that_was_stopped_goes_the_way_it_would_have_gone(tmp_path):
    whole = search(tmp_path / "whole", 3)
    search(tmp_path / "cut", 1)
    cut = search(tmp_path / "cut", 3)
    assert values(tmp_path / "cut") == values(tmp_path / "whole")
    assert len(values(tmp_path / "whole")) == 3 * 7
    assert cut.nodes == whole.nodes and cut.metrics == whole.metrics
    # Trials that are there are not run again.
    before = (tmp_path / "cut" / "trials.jsonl").read_bytes()
    search(tmp_path / "cut", 2)
    assert values(tmp_path / "cut") == values(tmp_path / "whole")
    assert (tmp_path / "cut" / "trials.jsonl").read_bytes()[: len(before)] == before

    with pytest.raises(ValueError, match=r"holds a search with max_steps=20, but 21 was asked for"):
        search(tmp_path / "cut", 3, with_settings(max_steps=21))
    with pytest.raises(ValueError, match="trials=0"):
        search(tmp_path / "none", 0)
    assert not (tmp_path / "none").exists()
