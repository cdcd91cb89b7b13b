"""Training bridges: what is logged, what is sparse, and that a resumed run is the same run."""

import math
from functools import partial
from pathlib import Path

import pytest
import torch
from huggingface_hub import metadata_load

from hf_circuit_sparsity import (
    BridgedCausalLM,
    BridgeTrainer,
    BridgeTrainingArguments,
    CircuitGPTConfig,
    SparseTrainingArguments,
)
from hf_circuit_sparsity.bridge.initialization import ridge_bridges_, standardize_bridges_
from hf_circuit_sparsity.bridge.losses import LOSS_TERMS
from tests.trainer.runs import training_logs, whole_and_resumed
from tests.two_processes import launch_and_resume


def sparse_config(**fields):
    return CircuitGPTConfig(
        n_layer=2, d_model=16, d_head=8, d_mlp=24, block_size=16, vocab_size=61, **fields
    )


@pytest.fixture
def make_bridged(make_gpt2, make_llama):
    def make(architecture="gpt2", seed=0, **fields):
        dense = make_gpt2() if architecture == "gpt2" else make_llama()
        torch.manual_seed(seed)
        return BridgedCausalLM.from_models(dense, sparse_config(**fields))

    return make


@pytest.fixture
def make_bridge_trainer(make_trainer):
    classes = {"trainer_class": BridgeTrainer, "arguments_class": BridgeTrainingArguments}
    return partial(make_trainer, **classes, max_steps=8, target_density=1 / 4)


def teach(dense, dataset):
    """Train a dense model for a moment, so that there is something to imitate."""
    ids = torch.tensor(dataset["input_ids"][:])
    optimizer = torch.optim.Adam(dense.requires_grad_(True).parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        dense(ids, labels=ids).loss.backward()
        optimizer.step()
    optimizer.zero_grad()
    dense.requires_grad_(False)


def assert_equal_parameters(one, other):
    for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name


RCD = {"sparsifier": "rcd", "rcd_config": {"block_fraction": 0.25}}


@pytest.mark.parametrize(("architecture", "settings"), [("gpt2", {}), ("llama", RCD)])
def test_every_term_falls_and_the_dense_model_stays(
    architecture, settings, make_bridged, make_bridge_trainer, dataset
):
    bridged = make_bridged(architecture)
    teach(bridged.dense, dataset)
    before = {name: p.clone() for name, p in bridged.dense.named_parameters()}
    trainer = make_bridge_trainer(bridged, max_steps=40, learning_rate=2e-2, **settings)
    first = trainer.evaluate()
    trainer.train()
    last = trainer.evaluate()
    for term in LOSS_TERMS:
        assert last[f"eval_{term}"] < first[f"eval_{term}"], term
    for name, p in bridged.dense.named_parameters():
        assert torch.equal(p, before[name]) and p.grad is None, name
    weight = bridged.sparse.transformer.h[0].mlp.c_fc.weight
    assert int((weight != 0).sum()) <= weight.numel() // 4
    trainer.create_model_card()
    data = metadata_load(Path(trainer.args.output_dir) / "README.md")
    numbers = {m["type"]: m["value"] for m in data["model-index"][0]["results"][0]["metrics"]}
    assert "bridge" in data["tags"] and numbers["kl"] == last["eval_kl"]


def test_logs_give_every_term_and_the_loss_is_their_weighted_sum(make_bridged, make_bridge_trainer):
    weights = {"lm": 0.5, "kl": 2.0, "nmse": 3.0, "dense_to_sparse": 0.25, "sparse_to_dense": 1.5}
    trainer = make_bridge_trainer(
        make_bridged(), **{f"{name}_weight": value for name, value in weights.items()}
    )
    trainer.train()
    for entry in training_logs(trainer):
        total = sum(weights[name] * entry[name] for name in LOSS_TERMS)
        assert entry["loss"] == pytest.approx(total, rel=1e-5)
        assert entry["nmse"] == pytest.approx(entry["encode_nmse"] + entry["decode_nmse"])
        assert entry["density"] and entry["nonzeros"]
    metrics = trainer.evaluate()
    for name in ("encode_nmse", "decode_nmse", "dense_to_sparse_kl", "sparse_to_dense_kl"):
        each = [metrics[f"eval_{name}_{location}"] for location in range(5)]
        whole = metrics[f"eval_{name.removesuffix('_kl')}"]
        assert whole == pytest.approx(sum(each) / 5, rel=1e-5)
    log = trainer.state.log_history[-1]
    assert log["eval_perplexity"] == pytest.approx(math.exp(metrics["eval_lm"]))


@pytest.mark.parametrize("sparse_bridges", [False, True])
def test_the_model_is_sparse_and_the_bridges_as_asked(
    sparse_bridges, make_bridged, make_bridge_trainer
):
    bridged = make_bridged()
    make_bridge_trainer(bridged, sparse_bridges=sparse_bridges).train()
    weight = bridged.sparse.transformer.h[0].mlp.c_fc.weight
    assert int((weight != 0).sum()) == weight.numel() // 4
    for bridge in bridged.bridges:
        for weight in (bridge.encoder.weight, bridge.decoder.weight):
            share = int((weight != 0).sum()) / weight.numel()
            assert share == (1 / 4 if sparse_bridges else 1.0)
    assert all((p != 0).all() for n, p in bridged.dense.named_parameters() if "wte" in n)


def test_locations_follow_from_seed_and_step(make_bridged, make_bridge_trainer):
    trainer = make_bridge_trainer(make_bridged(), hybrid_locations=2)
    draws = [trainer.sampled_locations(step) for step in range(60)]
    assert draws == [trainer.sampled_locations(step) for step in range(60)]
    for name in ("enter_at", "leave_at"):
        assert all(len(set(draw[name])) == 2 for draw in draws)
        assert {location for draw in draws for location in draw[name]} == set(range(5))
    other = make_bridge_trainer(make_bridged(), hybrid_locations=2, seed=4)
    assert draws != [other.sampled_locations(step) for step in range(60)]
    alone = make_bridge_trainer(make_bridged(), sparse_to_dense_weight=0.0, hybrid_locations=99)
    assert alone.sampled_locations(0) == {"enter_at": [0, 1, 2, 3, 4], "leave_at": []}


@pytest.mark.parametrize("sparsifier", ["topk", "rcd"])
def test_resuming_gives_bit_for_bit_the_run_that_never_stopped(
    sparsifier, make_bridged, make_bridge_trainer
):
    models = [make_bridged(dropout=0.1, seed=seed) for seed in (0, 0, 9)]
    whole, second, checkpoint = whole_and_resumed(
        make_bridge_trainer, models, 3, sparsifier=sparsifier
    )
    assert not (checkpoint / "model.safetensors").exists()
    logs = [[[e[k] for k in LOSS_TERMS] for e in training_logs(t)[3:]] for t in (whole, second)]
    assert logs[0] == logs[1]


def test_accumulating_gradients_equals_the_larger_batch(make_bridged, make_bridge_trainer, dataset):
    runs = []
    for batch, accumulate in ((16, 1), (4, 4)):
        # Otherwise the first batch would be measured, and that is another one.
        bridged = standardize_bridges_(make_bridged(), torch.tensor(dataset["input_ids"][:]))
        # The NMSE is normalized by the variance within a batch, so not a mean over its parts.
        trainer = make_bridge_trainer(
            bridged, name=f"batch{batch}", max_steps=4, nmse_weight=0.0,
            per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate,
        )  # fmt: skip
        trainer.train()
        runs.append([entry["loss"] for entry in training_logs(trainer)])
    assert runs[0] == pytest.approx(runs[1], rel=1e-4)


def test_what_is_saved_loads_and_the_best_checkpoint_comes_back(
    make_bridged, make_bridge_trainer, tmp_path
):
    bridged = make_bridged()
    trainer = make_bridge_trainer(
        bridged, target_density=1.0, eval_strategy="steps", eval_steps=2, save_strategy="steps",
        save_steps=2, load_best_model_at_end=True, metric_for_best_model="lm",
    )  # fmt: skip
    trainer.train()
    least = min(log["eval_lm"] for log in trainer.state.log_history if "eval_lm" in log)
    assert trainer.evaluate()["eval_lm"] == pytest.approx(least)
    trainer.save_model(str(tmp_path / "saved"))
    again = BridgedCausalLM.from_pretrained(tmp_path / "saved", dense=bridged.dense)
    assert_equal_parameters(bridged, again)


def test_bad_input_is_refused(make_bridged, make_bridge_trainer, make_gpt2, tmp_path):
    out = str(tmp_path / "out")
    for model, arguments, argument in [
        (make_gpt2(), BridgeTrainingArguments, "model"),
        (make_bridged(), SparseTrainingArguments, "args"),
    ]:
        with pytest.raises(TypeError, match=argument):
            BridgeTrainer(model, arguments(out, use_cpu=True))
    for settings, argument in [
        ({"nmse_weight": -1.0}, "nmse_weight"),
        ({f"{term}_weight": 0.0 for term in LOSS_TERMS}, "weights"),
        ({"hybrid_locations": -1}, "hybrid_locations"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"distillation_weight": 0.1}, "distillation_weight"),
    ]:
        with pytest.raises(ValueError, match=argument):
            BridgeTrainingArguments(out, use_cpu=True, **settings)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty"):
        make_bridge_trainer(make_bridged()).train(resume_from_checkpoint=str(tmp_path / "empty"))
    assert not Path(out).exists()


def test_the_size_of_the_dense_stream_does_not_matter(make_bridged, make_bridge_trainer, dataset):
    """The same dense model, its stream made a hundred times as long, gives the same bridges."""
    runs = []
    for factor in (1.0, 100.0):
        bridged = make_bridged()
        body = bridged.dense.transformer
        with torch.no_grad():  # norms follow, so that its answers stay
            body.wte.weight.data = body.wte.weight * factor
            body.wpe.weight.mul_(factor)
            for block in body.h:
                for linear in (block.attn.c_proj, block.mlp.c_proj):
                    linear.weight.mul_(factor)
                    linear.bias.mul_(factor)
            bridged.dense.lm_head.weight = torch.nn.Parameter(body.wte.weight / factor, False)
            for block in body.h:
                block.ln_1.eps = block.ln_2.eps = 1e-12
            body.ln_f.eps = 1e-12
        assert not any(bridge.is_standardized for bridge in bridged.bridges)
        trainer = make_bridge_trainer(bridged, name=f"times{factor}", max_steps=20)
        trainer.train()
        assert all(bridge.is_standardized for bridge in bridged.bridges)
        runs.append([entry["loss"] for entry in training_logs(trainer)])
    assert runs[0] == pytest.approx(runs[1], rel=1e-2)


def test_bridges_are_dense_so_their_learning_rate_is_too(make_bridged, make_bridge_trainer):
    for sparse_bridges in (False, True):
        trainer = make_bridge_trainer(make_bridged(), sparse_bridges=sparse_bridges)
        optimizer = trainer.create_optimizer()
        bridges = {id(p) for p in trainer.model.bridges.parameters()}
        for group in optimizer.param_groups:
            of_bridges = {id(p) in bridges for p in group["params"]}
            assert len(of_bridges) == 1 or sparse_bridges
            assert group["sharkfin"] == (sparse_bridges or of_bridges == {False})


def test_ridge_regression_is_the_best_linear_bridge(make_bridged, dataset):
    bridged = make_bridged()
    ids = torch.tensor(dataset["input_ids"][:])
    with pytest.raises(ValueError, match="input_ids"):
        ridge_bridges_(bridged, ids[:1])
    ridge_bridges_(bridged, ids, penalty=0.0, batch_size=24)
    dense, sparse = bridged.dense_stream, bridged.sparse_stream
    for location, bridge in enumerate(bridged.bridges):
        x, y = (
            stream.run(*stream.embed(ids, None))[location].detach().flatten(0, 1).double()
            for stream in (dense, sparse)
        )
        # It is the best for the standardized stream: errors of every channel count alike.
        torch.testing.assert_close(bridge.dense_mean.double(), x.mean(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(bridge.dense_scale.double(), x.std(0), rtol=1e-2, atol=1e-5)
        x = (x - bridge.dense_mean) / bridge.dense_scale
        for linear, source, target in ((bridge.encoder, x, y), (bridge.decoder, y, x)):
            constant = torch.ones(len(source), 1, dtype=torch.float64)
            best = torch.linalg.lstsq(torch.cat([source, constant], 1), target).solution
            residual = (source @ best[:-1] + best[-1] - target).square().sum()
            found = (linear(source.float()).double() - target).square().sum()
            assert found <= residual * 1.01 + 1e-6
    # A penalty trades error for smaller weights.
    free = [bridge.encoder.weight.norm() for bridge in bridged.bridges]
    ridge_bridges_(bridged, ids, penalty=1.0)
    assert all(b.encoder.weight.norm() < w for b, w in zip(bridged.bridges, free, strict=True))


SCRIPT = """
    import sys
    import torch
    from datasets import Dataset
    from transformers import GPT2Config, GPT2LMHeadModel
    from hf_circuit_sparsity import BridgedCausalLM, BridgeTrainer, BridgeTrainingArguments
    from tests.bridge.test_bridge_trainer import sparse_config

    folder, sparsifier = sys.argv[1:3]
    rows = torch.randint(61, (64, 12), generator=torch.Generator().manual_seed(1)).tolist()
    args = BridgeTrainingArguments(
        folder, max_steps=6, per_device_train_batch_size=4, sparsifier=sparsifier,
        target_density=0.25, rcd_config={"block_fraction": 0.25}, use_cpu=True, report_to=[],
        save_steps=3, logging_steps=1, disable_tqdm=True,
    )
    assert args.world_size == 2
    dense = GPT2Config(vocab_size=61, n_positions=16, n_embd=24, n_layer=2, n_head=2)
    torch.manual_seed(0)
    bridged = BridgedCausalLM.from_models(GPT2LMHeadModel(dense), sparse_config())
    trainer = BridgeTrainer(
        bridged, args, train_dataset=Dataset.from_dict({"input_ids": rows, "labels": rows})
    )
    trainer.train(resume_from_checkpoint=sys.argv[3] if len(sys.argv) > 3 else None)
    logs = [entry["nmse"] for entry in trainer.state.log_history if "nmse" in entry]
    torch.save(
        {"weights": bridged.state_dict(), "logs": logs}, f"{folder}/rank{args.process_index}.pt"
    )
"""


@pytest.mark.slow
@pytest.mark.parametrize("sparsifier", ["topk", "rcd"])
def test_two_processes_keep_ranks_equal_and_resume(sparsifier, tmp_path):
    first, second = launch_and_resume(SCRIPT, tmp_path, sparsifier)
    # Means over both processes, so the same in each.
    assert first["logs"] == second["logs"] and len(first["logs"]) == 6
