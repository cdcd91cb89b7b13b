"""The search elsewhere: other seeds, prompts and wordings, and where there is nothing to find."""

import re
from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from hf_circuit_sparsity import BinaryTask, build_corpus, load_task, train_tokenizer
from hf_circuit_sparsity.circuits.ablation import reference_means
from hf_circuit_sparsity.circuits.evaluation.alternatives import (
    fabricated_circuits,
    nonsense_answers,
    other_circuits,
    shuffled_weights,
)
from hf_circuit_sparsity.circuits.evaluation.verification import verify_circuit
from hf_circuit_sparsity.circuits.pruning.config import PruningConfig
from hf_circuit_sparsity.circuits.pruning.find import find_circuit
from hf_circuit_sparsity.circuits.task_scores import candidates, model_scores
from tests.circuits.planted import PLANTED_NODES, on_off_task, planted_model
from tests.conftest import random_model

SEARCH = PruningConfig(
    max_steps=30, batch_size=16, learning_rate=5e-2, selection_prompts=96, screen_prompts=0,
    node_penalty=3e-3,
)  # fmt: skip
REFERENCE = torch.randint(1, 16, (64, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def found():
    model, task = planted_model(), on_off_task()
    circuit = find_circuit(model, task, SEARCH, reference=REFERENCE, progress=False)
    assert circuit.nodes == PLANTED_NODES
    return model, task, circuit


def test_a_mechanism_is_found_again_from_other_prompts(found):
    model, task, circuit = found
    kinds = other_circuits(circuit, model, task, 2, REFERENCE, progress=False)
    assert list(kinds) == ["other seeds", "other prompts", "other wordings"]
    for circuits in kinds.values():
        assert len(circuits) == 2 and all(circuit.jaccard(other) == 1 for other in circuits)


def test_prompts_of_one_search_are_none_of_another(found, monkeypatch):
    model, task, circuit = found
    seen = []

    def recorded(model, task, config, **kwargs):
        seen.append((config.num_seeds, list(task.train["prompt"]), list(task.test["prompt"])))
        return [circuit] * config.num_seeds

    monkeypatch.setattr(
        "hf_circuit_sparsity.circuits.evaluation.alternatives.find_circuits", recorded
    )
    other_circuits(circuit, model, task, 2, REFERENCE, progress=False)
    (of_seeds, *parts) = seen
    train, test = list(task.train["prompt"]), list(task.test["prompt"])
    assert of_seeds == (2, train, test)
    for (_, first, _), (_, second, _), whole in ((*parts[:2], train), (*parts[2:], test)):
        assert sorted(first + second) == sorted(whole) and len(first) == len(second)
    assert parts[2][2] == train


def test_distractors_are_parted_as_prompts_are(found, tiny_config, monkeypatch):
    """What was searched for beside distractors is so elsewhere, and no two parts share one."""
    tokenizer = train_tokenizer(build_corpus()["train"].select(range(0, 700, 20)), vocab_size=600)
    config = deepcopy(tiny_config)
    config.vocab_size, config.block_size = len(tokenizer), 128
    task = load_task("single_double_quote", tokenizer, n_train=48, n_test=48, max_length=128)
    circuit = replace(found[2], config={**found[2].config, "distractor_fraction": 0.5})
    seen = []

    def recorded(model, task, config, **kwargs):
        seen.append((config.distractor_fraction, list(task.train["prompt"])))
        return [circuit] * config.num_seeds

    monkeypatch.setattr(
        "hf_circuit_sparsity.circuits.evaluation.alternatives.find_circuits", recorded
    )
    other_circuits(circuit, random_model(config), task, 2, REFERENCE, progress=False)
    (of_seeds, *parts) = seen
    assert of_seeds == (0.5, list(task.train["prompt"])) and {part[0] for part in parts} == {0.0}
    plain = {*task.train["prompt"], *task.test["prompt"]}
    for (_, first), (_, second) in (parts[:2], parts[2:]):
        assert not set(first) & set(second)
        new = [prompt for prompt in first + second if prompt not in plain]
        assert len(new) == 24 and all({"'", '"'} <= set(prompt) for prompt in new)
    # Other wordings have distractors of other wordings.
    words = [{w for _, part in of for p in part for w in re.findall("[a-z]{4,}", p)}
             for of in (parts[:2], parts[2:])]  # fmt: skip
    assert len(words[0] & words[1]) < 0.2 * len(words[0])


def test_nonsense_answers_have_nothing_to_do_with_the_right_ones():
    task = on_off_task()
    tensors = task.tensors("train")
    nonsense = nonsense_answers(tensors)
    assert torch.equal(candidates(nonsense).sort(1)[0], candidates(tensors).sort(1)[0])
    agree = (nonsense["target_ids"] == tensors["target_ids"]).float().mean()
    assert agree == 0.5  # one of each pair
    assert torch.equal(nonsense["input_ids"], tensors["input_ids"])


def test_shuffled_weights_are_the_same_numbers_elsewhere():
    model = planted_model()
    shuffled = shuffled_weights(model, torch.Generator().manual_seed(0))
    moved = 0
    for p, q in zip(model.parameters(), shuffled.parameters(), strict=True):
        assert torch.equal(p.flatten().sort()[0], q.flatten().sort()[0])
        moved += not torch.equal(p, q)
    assert moved == sum(p.dim() > 1 for p in model.parameters())


def test_a_search_for_nothing_makes_something_up_and_says_how_well(found):
    model, task, circuit = found
    calibration = model_scores(model, task.tensors("train"), task.tensors("test")).calibration
    made = fabricated_circuits(circuit, model, task, calibration, REFERENCE, progress=False)
    assert list(made) == ["nonsense task", "shuffled weights"]
    for fabricated in made.values():
        # This model has nothing but the mechanism: nothing else can be made of it.
        assert not fabricated.reached and fabricated.loss > 0.4 and fabricated.held_out > 0.4
        assert 0.3 < fabricated.accuracy < 0.8
    means = reference_means(model, REFERENCE)
    assert list(fabricated_circuits(circuit, model, task, calibration, means, progress=False)) == [
        "nonsense task"
    ]


def test_verify_shows_all_of_it(found):
    model, task, circuit = found
    checks = verify_circuit(
        circuit, model, task, prompts=64, random_circuits=2, stability_seeds=1, adversary_steps=1,
        reference=REFERENCE, adversarial={}, progress=False,
    )  # fmt: skip
    for kind in ("other seeds", "other prompts", "other wordings"):
        check = checks[f"stability: {kind}"]
        assert check.passed and check.value == 1 and check.threshold is not None
    assert checks["fabricated loss: nonsense task"].value > 0.4
    assert checks["fabricated nodes: shuffled weights"].control is None
    table = checks.table()
    assert "| fabricated nodes: nonsense task |" in table and " | – |" in table
    stored = checks.numbers()["fabricated nodes: nonsense task"]
    assert "control" not in stored and "threshold" not in stored


@pytest.mark.parametrize("settings", [{"interchange": 1.0}, {"ablation": "resample"}])
def test_a_search_by_counterfactuals_is_not_repeated_on_others_of_other_lengths(found, settings):
    model, _, circuit = found
    pairs = [(("w1 on", " yes"), ("w1 w2 off", " no"))]
    task = BinaryTask.from_pairs("lengths", on_off_task().tokenizer, pairs, pairs)
    searched = replace(circuit, config={**circuit.config, **settings})
    with pytest.raises(ValueError, match=next(iter(settings))):
        fabricated_circuits(searched, model, task, circuit.calibration, REFERENCE, progress=False)
