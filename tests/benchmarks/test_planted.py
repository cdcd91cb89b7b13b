"""The planted mechanisms are what they are said to be, in every architecture."""

import shlex
import subprocess
import sys

import pytest
import torch

from benchmarks.experiment import Experiment
from benchmarks.findings.planted import __main__ as planted_run
from benchmarks.findings.planted import searches
from benchmarks.findings.planted.__main__ import report
from benchmarks.findings.planted.builder import ARCHITECTURES
from benchmarks.findings.planted.mechanisms import MECHANISMS, Nodes, Truth, plant
from benchmarks.findings.planted.searches import ARCHIVE, measured
from hf_circuit_sparsity.circuits.ablation import mean_ablated
from hf_circuit_sparsity.circuits.pruning.config import PruningConfig
from hf_circuit_sparsity.circuits.task_scores import all_pair_logits, binary_accuracy

EVERY = [(name, architecture) for name in MECHANISMS for architecture in ARCHITECTURES]


def alone(planted, nodes: Nodes) -> float:
    """Held-out accuracy with all else mean-ablated, uncalibrated."""
    means = planted.means.nodes
    keep = {site: torch.zeros(len(mean), dtype=torch.bool) for site, mean in means.items()}
    for site, index in nodes:
        keep[site][index] = True
    with mean_ablated(planted.model, keep, means):
        return binary_accuracy(all_pair_logits(planted.model, planted.task.tensors("test")))


@pytest.mark.parametrize(("name", "architecture"), EVERY)
def test_the_mechanism_is_what_solves_the_task(name, architecture):
    planted = plant(name, architecture)
    truth, task = planted.truth, planted.task
    assert planted.task.equal_length
    for split in ("train", "test"):
        assert binary_accuracy(all_pair_logits(planted.model, task.tensors(split))) == 1.0
    # Each set that suffices, suffices; it needs all its nodes, and so does every required node.
    for choice in range(max((len(sets) for sets in truth.choices), default=1)):
        nodes = truth.sufficient(choice)
        assert alone(planted, nodes) == 1.0
        for node in nodes:
            assert alone(planted, nodes - {node}) <= 0.9, node
    assert alone(planted, truth.nodes) == 1.0
    assert alone(planted, truth.required) <= 0.9 or not truth.choices
    # In the whole model it is the cause, and the decoys are not.
    assert binary_accuracy(planted.swapped(truth.nodes)) == 0.0
    whole, swapped = planted.swapped(frozenset()), planted.swapped(truth.decoys)
    if "leaking" in name:  # it says a little, but decides nothing
        moved = 1 - (swapped[:, 0] - swapped[:, 1]).mean() / (whole[:, 0] - whole[:, 1]).mean()
        assert binary_accuracy(swapped) == 1.0 and 0.02 < moved < 0.5
    else:
        torch.testing.assert_close(swapped, whole, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", [n for n, m in MECHANISMS.items() if m.correlation])
def test_a_distractor_goes_with_the_answer_as_often_as_it_says(name):
    planted = plant(name)
    for split in (planted.task.train, planted.task.test):
        said = [1 if "red" in prompt.split() else -1 for prompt in split["prompt"]]
        answers = [1 if "yes" in target else -1 for target in split["target"]]
        correlation = torch.corrcoef(torch.tensor([said, answers]).double())[0, 1]
        assert correlation == pytest.approx(planted.correlation, abs=1e-6)


def test_parts_that_cancel_are_loud_one_by_one():
    planted = plant("cancelling parts")
    one = next(node for node in sorted(planted.truth.decoys) if "post_act" in node[0])
    # Without the one that says the opposite, the other drowns the answer.
    masks = {s: torch.ones(len(m), dtype=torch.bool) for s, m in planted.means.nodes.items()}
    masks[one[0]][one[1]] = False
    with mean_ablated(planted.model, masks, planted.means.nodes):
        left = all_pair_logits(planted.model, planted.task.tensors("test"))
    assert binary_accuracy(left) <= 0.9


@pytest.mark.parametrize(("name", "architecture"), [("and", "circuitgpt"), ("negation", "llama")])
def test_noise_leaves_the_task_solved(name, architecture):
    planted = plant(name, architecture, noise=0.02, seed=1)
    again = plant(name, architecture, noise=0.02, seed=1)
    pairs = all_pair_logits(planted.model, planted.task.tensors("test"))
    assert binary_accuracy(pairs) >= 0.95
    assert torch.equal(pairs, all_pair_logits(again.model, again.task.tensors("test")))
    assert alone(planted, planted.truth.sufficient()) >= 0.95


def test_sets_that_can_stand_for_each_other_count_once():
    a, b, c, d, e = ({("site", i)} for i in range(5))
    truth = Truth(frozenset(a), ((frozenset(b), frozenset(c | d)),), optional=frozenset(e))
    wrong = {("site", 9)}
    for found, expected in (
        (a | b, (1, 1)), (a | c | d, (1, 1)), (a | b | c | d | e, (1, 1)), (a | c, (1, 2 / 3)),
        (a | b | wrong, (2 / 3, 1)), (wrong, (0, 0)), (set(), (0, 0)), (e, (0, 0)),
    ):  # fmt: skip
        assert truth.precision_and_recall(frozenset(found)) == pytest.approx(expected), found


def test_a_search_is_held_against_the_truth():
    config = PruningConfig(
        max_steps=30, batch_size=16, learning_rate=5e-2, selection_prompts=64, node_penalty=3e-3
    )
    planted = plant("distractor 0.9")
    found, control = measured(config, planted, seed=0)
    assert found["precision"] == found["recall"] == found["turned"] == 1 and found["decoys"] == 0
    assert control["nodes"] == found["nodes"] and control["recall"] < 1
    of = {"architecture": "circuitgpt", "noise": 0.0, "sized": "paper", "mechanism": "and"}
    rows = [{**found, **of, "method": "paper"}, {"refused": True, **of, "method": "paper"}]
    assert "| and | paper | 2 | 1 | 1.00 ± 0.00 | 1.00 ± 0.00 | 1.00 | 6.00 |" in report(rows)


def test_what_was_measured_elsewhere_is_not_measured_again(tmp_path, monkeypatch):
    row = {"precision": 1.0, "recall": 1.0, "nodes": 6, "decoys": 0, "accuracy": 1.0, "turned": 1.0}
    monkeypatch.setattr(searches, "measured", lambda *_: [row, {**row, "precision": 0.25}])
    options = {
        "mechanisms": ("and",), "methods": ("KL",), "architectures": ("llama",), "noises": (0.01,),
        "seeds": 1, "workers": 1,
    }  # fmt: skip
    here = Experiment("planted", tmp_path / "runs", tmp_path / "results", **options)
    made = planted_run.run(here)
    assert "| KL | 1 | 0 | 1.00 ± 0.00 |" in made and "| random, as KL |" in made

    def measured_again(*_):
        raise AssertionError

    monkeypatch.setattr(searches, "measured", measured_again)
    kept = (tmp_path / "results" / ARCHIVE).read_bytes()
    there = Experiment("planted", tmp_path / "elsewhere", tmp_path / "results", **options)
    assert planted_run.run(there) == made
    assert (tmp_path / "results" / ARCHIVE).read_bytes() == kept


@pytest.mark.slow
def test_several_processes_share_the_runs(tmp_path):
    """As a person starts it: what `python -m` runs is not what a new process can import."""
    cells = "--mechanisms and or --methods 'no masks' --architectures circuitgpt --noises 0"
    command = f"{sys.executable} -m benchmarks.findings.planted {cells} --seeds 1 --workers 2"
    folders = ["--folder", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    subprocess.run([*shlex.split(command), *folders], check=True, timeout=300)
    made = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert made == ["no masks and circuitgpt 0 0.json", "no masks or circuitgpt 0 0.json"]
