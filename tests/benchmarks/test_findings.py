"""What the findings scripts rely on, at the size of a test."""

import pytest
import torch
from datasets import DatasetDict
from transformers import TrainerControl

from benchmarks.findings import pruning_frontier
from benchmarks.findings.circuit_anatomy import describe_nodes
from benchmarks.findings.findings import (
    edges_mean,
    frontier,
    kept,
    lowest_common_target,
    smallest,
    stored_tasks,
)
from benchmarks.findings.rcd_against_topk import noisy_weights
from benchmarks.findings.trained_models import NONZEROS, RECIPES, StopAtLoss, with_lessons
from hf_circuit_sparsity.circuits.ablation import mean_activations
from hf_circuit_sparsity.circuits.circuit import Circuit
from hf_circuit_sparsity.modeling.fingerprint import model_fingerprint
from hf_circuit_sparsity.tasks.corpus import build_corpus
from hf_circuit_sparsity.tasks.packing import pack_dataset
from hf_circuit_sparsity.tasks.tokenizer import train_tokenizer
from tests.circuits.planted import (
    PLANTED_NODES,
    on_off_task,
    planted_model,
    reference_ids,
    word_tokenizer,
)


def test_every_width_has_as_many_nonzeros():
    for name in ("topk-32-seed0", "topk-64-seed0", "topk-128-seed0", "topk-256-seed0"):
        recipe = RECIPES[name]
        d = recipe.d_model
        assert recipe.density * (2 * 2048 * d + 128 * d + 24 * d * d) == pytest.approx(NONZEROS)
    for recipe in RECIPES.values():
        assert recipe.stop_at_loss_of is None or recipe.stop_at_loss_of in RECIPES


def test_training_stops_at_the_loss():
    stop, control = StopAtLoss(3.0), TrainerControl()
    stop.on_evaluate(None, None, control, {"eval_loss": 3.1})
    assert not control.should_training_stop
    stop.on_evaluate(None, None, control, {"eval_loss": 3.0})
    assert control.should_training_stop


def test_lessons_are_a_quarter_of_the_text_and_answered():
    corpus = build_corpus()["train"].select(range(0, 600, 30))
    tokenizer = train_tokenizer(corpus, vocab_size=500)
    train = pack_dataset(corpus, tokenizer, 64)
    blocks = DatasetDict({"train": train.select(range(90)), "validation": train.select([0])})
    mixed = with_lessons(blocks, ("bracket_counting",), tokenizer)
    assert len(mixed["train"]) == 120 and len(mixed["validation"]) == 1
    lessons = [tokenizer.decode(ids) for ids in mixed["train"][90:]["input_ids"]]
    assert "]]\n" in "".join(lessons)
    assert with_lessons(blocks, (), tokenizer) is blocks


def test_noise_is_taken_back():
    model = planted_model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with noisy_weights(model, 0.5, seed=1):
        changed = [k for k, v in model.state_dict().items() if not torch.equal(v, before[k])]
        assert len(changed) == 8 and all(".c_" in name for name in changed)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_node_is_described_by_what_excites_it_and_what_it_reads_and_writes():
    model = planted_model()
    circuit = Circuit(
        PLANTED_NODES, mean_activations(model, reference_ids()), "on_off", model_fingerprint(model)
    )
    lines = describe_nodes(circuit, model, word_tokenizer(), on_off_task()).splitlines()
    row = {line.split(" | ")[0].strip("| "): line for line in lines if line.startswith("| h.")}
    assert list(row) == [f"{site}.{i}" for site, (i,) in PLANTED_NODES.items()]
    cells = row["h.0.attn.act_in.0"].split(" | ")
    assert "'on'" in cells[1] and "'off'" in cells[2] and "embedding of" in cells[3]
    assert "+2.00 → attn.v.5" in cells[4]
    assert "+3.00 · attn.v.5" in row["h.0.attn.resid_delta.3"]
    assert "h.1.mlp.act_in.3" in row["h.0.attn.resid_delta.3"]
    assert "logit of `'yes'` +3.00" in row["h.1.mlp.resid_delta.4"]
    # Without any one of them the circuit is lost.
    assert all(float(line.rstrip("| ").split(" | ")[-1]) > 0.5 for line in row.values())


def test_what_was_computed_is_kept(tmp_path):
    calls = []
    for _ in range(2):
        value = kept(tmp_path / "deep" / "x.json", lambda: calls.append(1) or {"a": 1.5})
        assert value == {"a": 1.5}
    assert len(calls) == 1


def test_the_smallest_circuit_and_the_mean():
    rows = [
        {"target": 0.15, "edges": 9, "nodes": 9},
        {"target": 0.15, "edges": 8, "nodes": 12},
        {"target": 0.3, "edges": 1, "nodes": 3},
    ]
    assert smallest(rows, 0.15)["nodes"] == 12 and smallest(rows, 0.5) is None
    assert edges_mean([2, 8]) == pytest.approx(4) and edges_mean([0, 4]) == pytest.approx(2)
    assert edges_mean([]) != edges_mean([])  # NaN


def test_models_are_compared_at_the_lowest_target_that_all_reach():
    easy = [{"target": t, "edges": 3, "nodes": 4} for t in (0.15, 0.3, 0.5)]
    assert lowest_common_target([easy, easy]) == 0.15
    assert lowest_common_target([easy, easy[1:]]) == 0.3
    assert lowest_common_target([easy, []]) is None


def test_circuits_of_another_search_are_kept_apart(tmp_path):
    rows = [{"target": 0.3, "edges": 3, "nodes": 4, "seed": 0}]
    path = tmp_path / "measured" / "some-model" / "frontier-dear-twice-the-updates" / "a_task.json"
    kept(path, lambda: rows)
    search = "dear, twice the updates"
    assert frontier("some-model", "a_task", tmp_path, search=search) == rows
    assert stored_tasks(["some-model"], ["a_task"], tmp_path, search) == ["a_task"]
    assert stored_tasks(["some-model"], ["a_task"], tmp_path) == []


def test_the_pruning_frontier_is_drawn_from_what_is_stored(tmp_path):
    assert "Not measured yet" in pruning_frontier.run(tmp_path, tmp_path, stored_only=True)
    sizes = {"nodes": 9, "edges": 8, "train_circuit_loss": 0.1, "circuit_loss": 0.12}
    measured = {
        "machine": "a machine",
        "seconds": {"together": 0.1, "one by one": 0.2, "all": 99.0},
        "ranked": [[5, 0.7], [10, 0.4]],
        "circuits": [{"target": 0.15, **sizes}, {"target": 0.3, **sizes, "edges": 0}],
    }
    kept(tmp_path / "measured" / pruning_frontier.MODEL / "pruning_frontier.json", lambda: measured)
    report = pruning_frontier.run(tmp_path, tmp_path, stored_only=True)
    assert (
        "| 0.15 | 9 | 8 | 0.100 | 0.120 |" in report
        and f"took 99 s, of which the masks {0.2 * pruning_frontier.CONFIG.steps:.0f} s" in report
    )
    assert (tmp_path / "pruning_frontier.png").stat().st_size > 1000
