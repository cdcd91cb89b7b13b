"""How many ways a model has: planted models with one, and with two equal paths."""

from dataclasses import replace

import pytest
import torch

from hf_circuit_sparsity.circuits.pruning import find
from hf_circuit_sparsity.circuits.pruning.config import PruningConfig
from hf_circuit_sparsity.circuits.pruning.exhaust import exhaust_circuits
from hf_circuit_sparsity.circuits.pruning.find import TaskNotLearnedError, find_circuits
from hf_circuit_sparsity.circuits.pruning.shrink import bisect
from tests.circuits.planted import (
    NO,
    PLANTED_NODES,
    YES,
    on_off_task,
    planted_model,
    reference_ids,
    unable_model,
)

SEARCH = PruningConfig(
    max_steps=60, batch_size=16, learning_rate=3e-2, selection_prompts=128, screen_prompts=64,
    node_penalty=3e-3,
)  # fmt: skip


def two_paths():
    """Two value channels that carry the same from the prompt to the unembedding."""
    model = planted_model()
    with torch.no_grad():
        t = model.transformer
        t.h[0].attn.c_attn.weight[2 * 8 + 6, 0] = 2.0
        t.h[0].attn.c_proj.weight[9, 6] = 3.0
        t.h[1].mlp.c_proj.weight[4, 7] = 0.0
        for channel in (3, 9):
            model.lm_head.weight[YES, channel], model.lm_head.weight[NO, channel] = 3.0, -3.0
        model.final_logits_bias.zero_()
    return model


def exhaust(model, **settings):
    return exhaust_circuits(
        model, on_off_task(), SEARCH, reference=reference_ids(), progress=False, **settings
    )


def test_one_path_is_all_core():
    ways = exhaust(planted_model())
    assert len(ways.circuits) == 1 and ways.exhausted
    assert ways.core == PLANTED_NODES == ways.circuits[0].nodes


def test_two_equal_paths_are_found_one_after_the_other():
    ways = exhaust(two_paths())
    assert ways.exhausted and len(ways.circuits) == 2
    assert {tuple(circuit.nodes["h.0.attn.v"]) for circuit in ways.circuits} == {(5,), (6,)}
    assert ways.core == {"h.0.attn.act_in": [0]}  # what both read
    assert len(exhaust(two_paths(), rounds=1).circuits) == 1


def test_excluded_nodes_are_in_no_circuit():
    tokens = replace(SEARCH, token_nodes=True)
    (circuit,) = find_circuits(
        two_paths(), on_off_task(), tokens, reference=reference_ids(), progress=False,
        exclude={"h.0.attn.v": [5]},
    )  # fmt: skip
    assert circuit.nodes["h.0.attn.v"] == [6]
    with pytest.raises(ValueError, match=r"h\.9\.attn\.v"):
        find_circuits(
            planted_model(), on_off_task(), SEARCH, reference=reference_ids(), progress=False,
            exclude={"h.9.attn.v": [5]},
        )  # fmt: skip
    with pytest.raises(TaskNotLearnedError, match="excluded"):
        find_circuits(
            planted_model(), on_off_task(), replace(SEARCH, max_steps=1), progress=False,
            reference=reference_ids(), exclude={"h.1.mlp.post_act": [7]},
        )  # fmt: skip


def test_nothing_to_exhaust():
    with pytest.raises(TaskNotLearnedError):
        exhaust(unable_model())
    with pytest.raises(ValueError, match="rounds"):
        exhaust(planted_model(), rounds=0)


@pytest.mark.parametrize("cleanup, bisected", [(True, [0.1]), (False, [0.1, 0.2])])
def test_without_clean_up_each_target_is_bisected_anew(cleanup, bisected, monkeypatch):
    """With it, the circuit of the next target is what the clean-up can still drop."""
    targets = []

    def recorded(scores, selector, allowed):
        targets.append(selector.config.target_loss)
        return bisect(scores, selector, allowed)

    monkeypatch.setattr(find, "bisect", recorded)
    find_circuits(
        two_paths(), on_off_task(), replace(SEARCH, cleanup=cleanup), reference=reference_ids(),
        progress=False, targets=[0.1, 0.2],
    )  # fmt: skip
    assert targets == bisected
