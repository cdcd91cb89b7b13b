"""One test per kind of experiment, at the size of a test: what its tables are made of."""

import math
import random
import tempfile
from itertools import pairwise

import numpy as np
import pytest
import torch

from benchmarks.experiment import Experiment, stored
from benchmarks.findings import (
    bridges,
    circuit_finetuning,
    mask_methods,
    on_paper,
    pretrained_steering,
    pruning_frontier,
    rcd_against_topk,
    rcd_peers,
    rcd_true_size,
)
from benchmarks.findings.circuit_anatomy import describe_nodes
from benchmarks.findings.findings import edges_mean, lowest_common_target, smallest
from benchmarks.findings.optimizer_comparison import ARCHITECTURES, METHODS, builder
from benchmarks.findings.rcd_against_topk import noisy_weights
from benchmarks.findings.rcd_race import Run, Training, bigram_loss, builders, race, seconds_to
from benchmarks.findings.rcd_search import parse
from benchmarks.findings.soak import sample
from benchmarks.findings.trained_models import NONZEROS, RECIPES
from hf_circuit_sparsity.bridge.steering import answer_rows, steering_candidates
from hf_circuit_sparsity.circuits.ablation import mean_activations
from hf_circuit_sparsity.circuits.circuit import Circuit
from hf_circuit_sparsity.modeling.fingerprint import model_fingerprint
from tests.bridge.test_steering import planted_bridge
from tests.circuits.planted import (
    OFF,
    ON,
    PLANTED_NODES,
    YES,
    on_off_task,
    planted_model,
    reference_ids,
    word_tokenizer,
)  # fmt: skip
from tests.conftest import random_model

BLOCKS = torch.arange(64 * 16).reshape(64, 16) % 61


def test_large_runs_are_counted_from_the_models_themselves():
    small, large = on_paper.MODELS.values()
    assert on_paper.parameters(small) == 1_235_814_400
    assert on_paper.parameters(large) == 8_030_261_248
    # A tied unembedding is multiplied with; an embedding of its own is looked up.
    norms = 2 * 2048 * 16 + 2048
    assert on_paper.multiplied(small) == on_paper.parameters(small) - norms
    few, many = (on_paper.cost(large, "top-k, FSDP2", gpus) for gpus in on_paper.GPUS)
    assert few.state == 16 * on_paper.parameters(large) / 8 == 8 * many.state
    assert few.compute == 8 * many.compute
    alone = on_paper.cost(large, "RCD", 8)
    assert alone.traffic < few.traffic / 100 and alone.compute == few.compute


def test_every_width_has_as_many_nonzeros():
    for d in (32, 64, 128, 256):
        density = RECIPES[f"topk-{d}-seed0"].density
        assert density * (2 * 2048 * d + 128 * d + 24 * d * d) == pytest.approx(NONZEROS)


def test_models_are_compared_at_the_lowest_target_that_all_reach():
    rows = [{"target": t, "edges": 3, "nodes": n} for t in (0.15, 0.3) for n in (5, 4)]
    assert smallest(rows, 0.15)["nodes"] == 4 and smallest(rows, 0.5) is None
    assert (
        lowest_common_target([rows, rows[2:]]) == 0.3 and lowest_common_target([rows, []]) is None
    )
    assert edges_mean([0, 4]) == pytest.approx(2) and math.isnan(edges_mean([]))


def test_noise_is_taken_back():
    model = planted_model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with noisy_weights(model, 0.5, seed=1):
        assert sum(not torch.equal(v, before[k]) for k, v in model.state_dict().items()) == 8
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_two_ways_to_train_are_compared_task_by_task_and_seed_by_seed(tmp_path):
    pytest.importorskip("matplotlib")
    sites = {("RCD", "a"): {"x": 2, "y": 2}, ("RCD", "b"): {"y": 4}}
    cells = [
        {
            "side": side, "seed": seed, "task": task, "nodes": 4, "edges": edges, "shared": 0.5,
            "seen": 0.2, "unseen": 0.4, "sites": sites.get((side, task), {"x": 4}),
            "checks": {"transfer": [0.8 + seed / 10, seed > 0], "no bound": [1.0, None]},
            "noise": {part: [0.1 * i for i in range(5)] for part in ("model", "circuit")},
        }
        for side, edges in (("top-k", 8), ("RCD", 2)) for seed in (0, 1) for task in "ab"
    ]  # fmt: skip
    experiment = Experiment("rcd_against_topk", tmp_path, tmp_path)
    rows = rcd_against_topk.report([{"model": "m"}], cells, experiment).splitlines()
    sizes = "| all | 4 | 4.0 | 4.0 | 1.00 | 8.0 | 2.0 | 0.25 | 0.50 | 0.50 | 0.20 | 0.20 |"
    assert any(row.startswith(sizes) for row in rows)
    assert "| transfer | 0.85 ± 0.05 | 2 of 4 | 0.85 ± 0.05 | 2 of 4 |" in rows
    assert "| top-k | 2 | 1.00 ± 0.00 | 1.00 ± 0.00 | 1.00 |" in rows
    assert "| RCD | 2 | 1.00 ± 0.00 | 0.33 ± 0.00 | 1.00 |" in rows
    assert not any("no bound" in row for row in rows)
    assert (tmp_path / "rcd_against_topk.png").is_file()


def test_a_node_is_described_by_what_excites_it_and_what_it_reads_and_writes():
    model = planted_model()
    means, fingerprint = mean_activations(model, reference_ids()), model_fingerprint(model)
    example = {"token_ids": [ON], "counterfactual_token_ids": [OFF], "target_id": YES}
    circuit = Circuit(PLANTED_NODES, means, "on_off", fingerprint, example=example)
    lines = describe_nodes(circuit, model, word_tokenizer(), on_off_task()).splitlines()
    row = {line.split(" | ")[0].strip("| "): line for line in lines if line.startswith("| h.")}
    assert list(row) == [f"{site}.{i}" for site, (i,) in PLANTED_NODES.items()]
    cells = row["h.0.attn.act_in.0"].split(" | ")
    assert "'on'" in cells[1] and "'off'" in cells[2] and "+2.00 · 0.attn.v.5" in cells[4]
    assert "token `'on'`" in cells[3] and "answer `'yes'` +3.00" in row["h.1.mlp.resid_delta.4"]
    assert all(float(line.rstrip("| ").split(" | ")[-1]) > 0.5 for line in row.values())


def test_the_pruning_frontier_is_drawn_from_what_is_stored(tmp_path):
    pytest.importorskip("matplotlib")
    experiment = Experiment("pruning_frontier", tmp_path, tmp_path, stored_only=True)
    sizes = {"nodes": 9, "edges": 8, "train_circuit_loss": 0.1, "circuit_loss": 0.12}
    seconds = {"together": 0.1, "one by one": 0.2, "all": 99.0}
    ranked, circuits = [[5, 0.7], [10, 0.4]], [{"target": 0.15, **sizes}]
    measured = {"machine": "", "seconds": seconds, "ranked": ranked, "circuits": circuits}
    path = tmp_path / "measured" / pruning_frontier.MODEL / "pruning_frontier.json"
    stored(path, lambda: measured)
    assert "| 0.15 | 9 | 8 | 0.100 | 0.120 |" in pruning_frontier.run(experiment)
    assert (tmp_path / "pruning_frontier.png").is_file()


def test_the_channel_that_works_is_chosen_and_not_the_one_that_should():
    bridged = planted_bridge()
    figures = bridges.bridge_figures(bridged, reference_ids()[:32])
    assert figures["encode_nmse"] == pytest.approx([0.0] * 5, abs=1e-6)
    good, *_, bad = steering_candidates(bridged, on_off_task(), YES)
    order = [bad._replace(effect=99.0), good]
    task, tokenizer = on_off_task(), word_tokenizer()
    assert bridges.choose_channel(bridged, tokenizer, task, YES, order).candidate == good


def test_steering_at_a_price_is_compared_with_channels_that_nobody_ranked(monkeypatch):
    monkeypatch.setattr(bridges, "PRICES", (1.0, 4.0))
    bridged, task, tokenizer = planted_bridge(), on_off_task(), word_tokenizer()
    ranked, text = steering_candidates(bridged, task, YES)[:2], reference_ids()[:4]
    rows = bridges.at_a_price(bridged, tokenizer, task, YES, ranked, text)
    assert [row["KL on text"] for row in rows] == ["1", "4"]
    assert all(row["steered"] == "`' yes'` → `' no'`" for row in rows)
    best, means = (
        [float(row[key].split(" ")[0]) for row in rows]
        for key in ("best ranked channel", "difference of means on the dense stream")
    )
    assert best[1] > 0.9 and best[1] > best[0] and means[1] > 0.9


def test_an_adapter_is_taught_the_other_answer():
    model, task = planted_model(), on_off_task()
    loss = circuit_finetuning.teach(model, task.tensors("train"), rate=0.1, steps=60)
    assert loss < math.log(2)


@pytest.mark.parametrize("method", ["topk", "rcd", "adamw"])
@pytest.mark.parametrize("held", ["matrices", "nonzeros"])
def test_a_race_that_was_interrupted_ends_as_one_that_was_not(tiny_config, method, held, tmp_path):
    sparse = builders(tiny_config, BLOCKS)[1] if held == "nonzeros" else None
    run = Run(method, 6, 1e-2, 4, {"start_density": 1 / 4} if method == "rcd" else {})
    whole, halves, again = (
        Training(lambda: random_model(tiny_config), run, 1 / 8, BLOCKS, BLOCKS[:8], sparse)
        for _ in range(3)
    )
    race({"a": whole}, tmp_path / "whole", 1e9, 3)
    halves.run(2)
    halves.evaluate()
    halves.save(tmp_path / "a.pt")
    race({"a": again}, tmp_path, 1e9, 3)
    losses = [[point["loss"] for point in training.curve] for training in (again, whole)]
    assert losses[0] == losses[1] and len(losses[0]) == 3
    assert seconds_to(again.curve, losses[0][0]) == again.curve[0]["seconds"]
    for training in (whole, halves, again):
        training.close()


def test_the_bigram_loss_is_that_of_the_counts():
    loss, smoothing = bigram_loss(*[torch.tensor([[0, 1, 0, 1]] * 50)] * 2, 2)
    # 0 is always followed by 1: (100 + 3 / 2) of 103, and 1 by 0 in all 50 cases.
    expected = -(2 * math.log(101.5 / 103) + math.log(51.5 / 53)) / 3
    assert smoothing == 3.0 and loss == pytest.approx(expected, rel=1e-3)


def test_lines_of_a_search():
    run = parse("rcd steps=12 lr=2e-2 block_fraction=1/4 selection=gradient")
    assert run == Run("rcd", 12, 0.02, 4, {"block_fraction": 0.25, "selection": "gradient"})
    for line in ("adam lr=1", "rcd fast"):
        with pytest.raises(ValueError, match=line.split()[-1]):
            parse(line)


@pytest.mark.parametrize("tied", [False, True])
def test_the_cost_of_a_step_on_every_side(tied, monkeypatch, tmp_path):
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
             "num_attention_heads": 2, "tie_word_embeddings": tied}  # fmt: skip
    monkeypatch.setitem(rcd_true_size.MODELS, "tiny", {"model_type": "llama", **sizes})
    for side in (rcd_true_size.RCD, *rcd_true_size.COPIES):
        found = rcd_true_size.cost("tiny", side, 512, 1, 1)
        assert found["seconds"] > 0 and found["peak"] >= 0
    options = {"models": ("tiny",), "piece": 512, "steps": 1, "threads": 1, "most_gb": 0.0}
    report = rcd_true_size.run(Experiment("x", tmp_path, stored_only=True, **options))
    assert report.count("(computed)") == 3


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_optimizer_trains_every_architecture(architecture):
    for kind, (*_, lr), settings in METHODS.values():
        run, blocks = Run(kind, 4, lr, 4, settings), BLOCKS % 64
        training = Training(builder(architecture, 64, 1, 64), run, 1 / 8, blocks, blocks[:4])
        before = training.evaluate()
        training.run(4)
        assert training.evaluate() < before
        training.close()


@pytest.mark.parametrize("method", mask_methods.METHODS)
def test_other_ways_to_a_mask_end_at_the_density(method, tiny_config):
    """GMP never lets a weight come back, AC/DC does between its phases, and the straight-through
    estimator moves the weights that it hides."""
    run = Run(method, 40, 1e-3, 4)
    training = Training(lambda: random_model(tiny_config), run, 1 / 4, BLOCKS, BLOCKS[:4])
    (group, *_) = [g for g in training.optimizer.param_groups if g["sparse"]]
    weight = max(group["params"], key=torch.numel)
    masks = [weight != 0]
    for _ in range(40):
        training.run(1)
        masks.append(weight != 0)
    shares = [mask.float().mean().item() for mask in masks]
    assert shares[-1] == pytest.approx(1 / 4, abs=0.02)
    came_back = sum(int((after & ~before).sum()) for before, after in pairwise(masks))
    assert (came_back == 0) == (method == "gmp")
    if method == "gmp":
        at = [1 - 0.75 * (1 - (1 - done / 20) ** 3) for done in range(21)]
        assert shares == pytest.approx([*at, *[1 / 4] * 20], abs=0.01)
    elif method == "acdc":
        assert [share > 0.9 for share in shares[1:9]] == [True, False, False, True] * 2
    else:
        assert shares[0] == pytest.approx(1 / 4, abs=0.02)
    training.close()


def test_the_best_rate_lies_between_two_worse_ones(tmp_path):
    asked = []

    def trained(exponent):
        asked.append(exponent)
        return {"loss": (exponent + 2.2) ** 2}

    best, tried = rcd_peers.best_exponent(trained)
    assert best == -2 and sorted(asked) == [-3, -2, -1, 0, 1] and set(asked) == set(tried)
    assert rcd_peers.best_exponent(lambda exponent: None)[1] == {}


def test_peers_are_compared_seed_by_seed(tmp_path):
    sizes = {"d_model": 16, "layers": 1, "vocabulary": 300, "inverse_density": 4, "steps": 4,
             "batch": 2, "seeds": 2}  # fmt: skip
    held_out = BLOCKS.new_zeros(4, rcd_peers.CONTEXT)
    for split in ("train", "validation"):
        np.save(tmp_path / f"{split}-300-128.npy", (held_out + torch.arange(128) % 7).numpy())
    sides = ("frozen", "RCD, replacing")
    experiment = Experiment("rcd_peers", tmp_path, tmp_path, sides=sides, **sizes)
    text = rcd_peers.run(experiment)
    rows = {line.split(" | ")[0].strip("| "): line for line in text.splitlines() if "±" in line}
    assert sides[0] in rows and "0.000 ± 0.000" in rows["frozen"] and sides[1] in rows
    experiment.stored_only = True
    assert rcd_peers.run(experiment) == text


def test_the_soak_notices_what_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    model = planted_model()
    before = sample(0, model, tmp_path)
    model.lm_head.register_forward_hook(lambda *args: None)
    (tmp_path / ".begun").touch()
    kept = [torch.ones(1) for _ in range(50)]
    with open(tmp_path / "open", "w"):
        after = sample(0, model, tmp_path)
    grown = {name: after[name] - before[name] for name in after}
    assert (grown["hooks"], grown["files"], grown["descriptors"]) == (1, 1, 1)
    assert grown["tensors"] >= len(kept) - 5


def test_neurons_are_followed_by_what_they_write_and_controls_are_others():
    model, draw = planted_model(), random.Random(0)
    rows = answer_rows(on_off_task(), "train", YES, 8)
    own = {0: [], 1: [7]}
    (shift,) = pretrained_steering.neuron_shifts(model, rows, own)
    assert (shift.location, shift.channel) == (4, 7)
    # What that neuron says is the answer, and it says it to channel 4 alone, but for noise.
    assert shift.vector[4] < -10 and shift.vector.abs().sort().values[-2] < 0.2
    other = pretrained_steering.outside(own, 16, draw)
    assert other[0] == [] and len(other[1]) == 1 and other[1] != [7]
    none = {**own, 1: other[1]}
    assert all(s.location == 4 for s in pretrained_steering.neuron_shifts(model, rows, none))
    line = {
        "task": "on_off", "answer": " yes", "other": " no", "unsteered_probability": 0.0,
        "pool": 1, "location": 4,
    }  # fmt: skip
    kinds = {"sparse circuit's": 0.9, "others, draw 0": 0.1, "others, draw 1": 0.3}
    lines = [{**line, "kind": kind, "other_probability": p} for kind, p in kinds.items()]
    text = pretrained_steering.report(lines)
    assert "| sparse circuit's | others | the circuit's neurons |" in text
    assert "| 0.900 (after layer 1 MLP) | 0.200 (0.100–0.300) | 1 |" in text
