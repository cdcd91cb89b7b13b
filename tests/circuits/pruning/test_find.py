import math
from dataclasses import replace

import pytest
import torch

from hf_circuit_sparsity import BinaryTask, PruningConfig, TaskNotLearnedError, find_circuit
from hf_circuit_sparsity.circuits.ablation import TOKENS, mean_activations, reference_means
from hf_circuit_sparsity.circuits.pruning.find import mean_jaccard
from hf_circuit_sparsity.circuits.pruning.masks import Gate, learn_masks
from hf_circuit_sparsity.circuits.pruning.selector import Selector
from hf_circuit_sparsity.circuits.pruning.shrink import bisect
from hf_circuit_sparsity.circuits.task_scores import (
    all_pair_logits,
    binary_accuracy,
    binary_loss,
    model_scores,
)
from tests.circuits.planted import (
    NO,
    PLANTED_EDGES,
    PLANTED_NODES,
    YES,
    on_off_task,
    planted_model,
    reference_ids,
    unable_model,
    word_tokenizer,
)
from tests.circuits.pruning.conftest import QUICK, QUICKER, find, find_all


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_planted_circuit_is_found(seed):
    model = planted_model(seed=seed)
    circuit = find(model, seed=seed)
    assert circuit.nodes == PLANTED_NODES
    edges = {e.name: e.weight for e in circuit.edges(model)}
    assert edges == pytest.approx(PLANTED_EDGES)
    metrics = circuit.metrics
    assert metrics["nodes"] == 6 and metrics["edges"] == 4
    assert metrics["circuit_loss"] <= 0.15 and metrics["circuit_accuracy"] == 1
    assert metrics["ablated_loss"] >= 0.6
    test = on_off_task().tensors("test")
    with circuit.apply(model, calibrated=False):
        raw = binary_loss(all_pair_logits(model, test)).item()
    assert metrics["uncalibrated_circuit_loss"] == pytest.approx(raw)
    assert raw != pytest.approx(metrics["circuit_loss"])
    # The masks alone open the planted nodes and hardly another.
    scores, planted = (torch.cat(list(v.values())) for v in (circuit.scores, circuit.masks()))
    assert (scores[planted] > 0).all() and (scores[~planted] > 0).sum() <= 2
    assert scores.abs().max() <= 1


@pytest.mark.parametrize(
    ("reached_by", "found"),
    [
        (lambda k: k >= 7, 7),
        # Above what the masks left open (10) the loss rises again; below, it does not.
        (lambda k: k >= 90 or 4 <= k <= 12, 4),
        (lambda k: k >= 90 or 4 <= k <= 9, 90),  # not even the open nodes reach the target
    ],
)
def test_bisection_goes_on_below_the_nodes_left_open(reached_by, found):
    class Reached:
        def reaches(self, keep):
            return reached_by(int(sum(mask.sum() for mask in keep.values())))

    ranked = torch.linspace(1, -1, 100)
    scores = {"a": ranked[:60] - 0.8, "b": ranked[60:] - 0.8}
    assert (torch.cat(list(scores.values())) > 0).sum() == 10
    keep = bisect(scores, Reached())
    kept = torch.cat(list(keep.values()))
    assert kept[:found].all() and kept.sum() == found


def test_gate_is_a_step_forward_and_a_sigmoid_backward():
    tau = torch.tensor([-1.0, -0.1, 0.0, 0.1, 1.0], requires_grad=True)
    gate = Gate.apply(tau, 0.5)
    assert gate.tolist() == [0, 0, 0, 1, 1]
    gate.sum().backward()
    smooth = tau.detach().clone().requires_grad_()
    torch.sigmoid(smooth / 0.5).sum().backward()
    torch.testing.assert_close(tau.grad, smooth.grad)


def test_model_is_left_as_it_was():
    model = planted_model().train()
    model.transformer.h[0].eval()  # a part that somebody froze
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    find(model, max_steps=5)
    assert [module.training for module in model.modules()] == modes
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(site._forward_hooks for site in model.node_sites().values())


def test_the_same_seed_gives_the_same_circuit():
    first, second = find(config=QUICKER), find(config=QUICKER)
    assert first.nodes == second.nodes and first.metrics == second.metrics
    assert all(torch.equal(first.scores[s], second.scores[s]) for s in first.scores)


def test_mean_activations_are_means():
    model, ids = planted_model(), reference_ids()
    seen = []
    site = model.node_sites()["h.1.mlp.post_act"]
    handle = site.register_forward_hook(lambda m, a, out: seen.append(out))
    with torch.no_grad():
        model(ids)
    handle.remove()
    means = mean_activations(model, ids, batch_size=10)  # 64 sequences: the last batch is smaller
    torch.testing.assert_close(means["h.1.mlp.post_act"], seen[0].mean((0, 1)))
    assert set(means) == set(model.node_sites())


def test_seeds_learned_together_are_seeds_learned_one_by_one():
    model = planted_model()
    means = reference_means(model, reference_ids())
    tensors = on_off_task().tensors("train")
    everything = {**means.nodes, TOKENS: means.token}
    alone = PruningConfig(**{**QUICKER.__dict__, "memory_gb": 1e-9})
    together, one_by_one = (
        learn_masks(model, tensors, everything, config, [3, 4, 5], progress=False)
        for config in (QUICKER, alone)
    )
    for masks, others in zip(together, one_by_one, strict=True):
        for site, tau in masks.items():
            torch.testing.assert_close(tau, others[site], atol=1e-5, rtol=0)
    site = "h.0.attn.v"
    assert not torch.allclose(together[0][site], together[1][site])


def test_screening_leads_to_circuits_that_cannot_lose_a_node_either():
    assert find(config=QUICKER).nodes == find(config=QUICKER, screen_prompts=0).nodes


def test_a_screen_of_all_prompts_is_none(monkeypatch):
    """What is measured on all prompts is not measured on the same ones before."""
    measured, losses = [], Selector._losses

    def counted(self, gates, rows):
        measured.append(len(rows["target_ids"]))
        return losses(self, gates, rows)

    monkeypatch.setattr(Selector, "_losses", counted)
    without, of_without = find(config=QUICKER, screen_prompts=0), list(measured)
    measured.clear()
    assert find(config=QUICKER, screen_prompts=60).nodes == without.nodes
    assert measured == of_without and set(measured) == {60}


def test_every_seed_has_its_circuit_and_says_so():
    circuits = find_all(config=QUICKER, num_seeds=2, seed=7)
    assert [c.config["seed"] for c in circuits] == [7, 8]
    assert circuits[0].jaccard(circuits[0]) == 1
    assert 0 < mean_jaccard(circuits) <= 1


def test_a_task_the_model_has_not_learned_says_what_it_can_reach():
    model = unable_model()
    with pytest.raises(TaskNotLearnedError, match=r"0\.693.*'on_off'"):
        find(model)
    # Asked for no more than guessing, it finds the circuit of guessing: hardly anything.
    circuit = find(model, max_steps=5, target_loss=1.0, selection_prompts=100)
    assert len(circuit) == 0
    assert circuit.metrics["circuit_loss"] == pytest.approx(math.log(2), abs=0.02)


@pytest.mark.parametrize("seed", [0, 1])
def test_what_leaks_through_small_weights_is_no_circuit(seed):
    """A scale and shift fitted to each candidate found three nodes here, half of the chain."""
    model, task = planted_model(noise=0.05, seed=seed), on_off_task()
    circuit = find(model, target_loss=0.65)
    assert circuit.nodes == PLANTED_NODES and circuit.metrics["circuit_loss"] < 0.01
    assert (
        circuit.calibration
        == model_scores(model, *map(task.tensors, ("train", "test"))).calibration
    )


def test_a_model_that_answers_the_other_way_round_has_not_learned_the_task(model):
    with torch.no_grad():
        model.lm_head.weight[[YES, NO]] *= -1
        model.final_logits_bias *= -1
    with pytest.raises(TaskNotLearnedError, match="'on_off'"):
        find(model)
    train, test = map(on_off_task().tensors, ("train", "test"))
    whole = model_scores(model, train, test)
    assert binary_accuracy(whole.test) == 0 and whole.calibration.scale > 0
    assert binary_loss(whole.calibration.pairs(whole.test, test)) > math.log(2)


def test_a_task_without_signal_is_refused():
    generator = torch.Generator().manual_seed(0)

    def pairs(count):
        # Which of two unrelated prompts is answered by yes is a matter of chance.
        for _ in range(count):
            words = [f"w{int(i)}" for i in torch.randint(0, 11, (6,), generator=generator)]
            yield ((" ".join(words[:3]), " yes"), (" ".join(words[3:]), " no"))

    task = BinaryTask.from_pairs("chance", word_tokenizer(), list(pairs(60)), list(pairs(20)))
    with pytest.raises(TaskNotLearnedError, match="'chance'"):
        find(task=task)


@pytest.mark.parametrize(
    "setting",
    [{"target_loss": 0.0}, {"batch_size": 0}, {"selection_margin": 1.5}, {"num_seeds": 0},
     {"memory_gb": 0.0}, {"screen_prompts": -1}, {"distractor_fraction": 1.5}],
)  # fmt: skip
def test_bad_settings(setting):
    ((name, value),) = setting.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        PruningConfig(**setting)


def test_bad_arguments():
    with pytest.raises(ValueError, match="model_type"):
        find_circuit(torch.nn.Linear(2, 2), None)
    model = planted_model()
    model.config.block_size = 5
    with pytest.raises(ValueError, match="max_length"):
        find(model)
    with pytest.raises(ValueError, match="reference"):
        find_circuit(planted_model(), on_off_task(), QUICK, reference=torch.arange(5))
    with pytest.raises(ValueError, match="No distractors are known for the task 'on_off'"):
        find(config=replace(QUICK, distractor_fraction=0.5))
