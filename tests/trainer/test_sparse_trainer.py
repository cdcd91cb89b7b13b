import copy
import logging
import math
from inspect import signature
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_circuit_sparsity import SparseTrainer, TopKAdamW, sparse_param_groups
from hf_circuit_sparsity.modeling.sparse_layers import sparse_layers, to_sparse
from hf_circuit_sparsity.optim.projection import nonzero_budget
from hf_circuit_sparsity.optim.schedules import linear_density
from tests.conftest import random_model
from tests.trainer.runs import expected_nonzeros, nonzeros, training_logs, whole_and_resumed

RCD = {
    "sparsifier": "rcd",
    "rcd_config": {"selection": "magnitude", "block_steps": 2, "block_fraction": 0.25},
}


class Watcher(TrainerCallback):
    """Checks the model after every step and records what it saw."""

    def __init__(self, schedule):
        self.schedule = schedule
        self.densities = []

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        density = self.schedule[state.global_step - 1]
        expected = expected_nonzeros(model, density)
        # Biases start at zero and an unused embedding row may stay there: never more than the
        # budget, and exactly the budget for the matrices that start full.
        found = nonzeros(model, expected)
        assert all(found[name] <= expected[name] for name in expected)
        exact = [name for name in expected if "bias" not in name]
        assert {n: found[n] for n in exact} == {n: expected[n] for n in exact}
        self.densities.append(density)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_density_follows_the_schedule_and_the_run_ends_at_the_target(
    architecture, make_gpt2, make_llama, make_trainer
):
    model = make_gpt2() if architecture == "gpt2" else make_llama()
    watcher = Watcher([linear_density(s, 1 / 8, 0.0, 0.5, 12) for s in range(1, 13)])
    trainer = make_trainer(model, callbacks=[watcher])
    trainer.train()
    assert len(watcher.densities) == 12
    assert watcher.densities[-1] == 1 / 8
    logs = training_logs(trainer)
    assert [entry["density"] for entry in logs] == watcher.densities
    total = sum(
        p.numel() for g in sparse_param_groups(model) if g["sparse"] for _, p in g["params"]
    )
    assert logs[-1]["nonzeros"] == sum(nonzeros(model, expected_nonzeros(model, 1 / 8)).values())
    assert logs[-1]["nonzero_fraction"] == pytest.approx(logs[-1]["nonzeros"] / total)
    norm = {"gpt2": "transformer.ln_f.weight", "llama": "model.norm.weight"}[architecture]
    assert int(torch.count_nonzero(model.get_parameter(norm))) == 24
    assert logs[-1]["loss"] < logs[0]["loss"]


def test_steps_are_counted_in_epochs_too(make_gpt2, make_trainer):
    # 64 sequences, batches of 8, two to a step: 4 steps an epoch.
    trainer = make_trainer(
        make_gpt2(), max_steps=-1, num_train_epochs=3, gradient_accumulation_steps=2
    )
    trainer.train()
    assert trainer.optimizer.param_groups[0]["total_steps"] == 12
    densities = [entry["density"] for entry in training_logs(trainer)]
    assert densities == [linear_density(s, 1 / 8, 0.0, 0.5, 12) for s in range(1, 13)]


def test_optimizer_built_before_training_knows_the_steps(make_gpt2, make_trainer):
    trainer = make_trainer(make_gpt2(), max_steps=-1, num_train_epochs=2)
    assert trainer.create_optimizer().param_groups[0]["total_steps"] == 16
    trainer = make_trainer(make_gpt2())
    trainer.train_dataset = None  # max_steps says it all
    assert trainer.create_optimizer().param_groups[0]["total_steps"] == 12
    trainer = make_trainer(make_gpt2())
    trainer.create_optimizer_and_scheduler(num_training_steps=77)
    assert {group["total_steps"] for group in trainer.optimizer.param_groups} == {77}
    # As when a smaller batch is tried after running out of memory.
    trainer.create_optimizer_and_scheduler(num_training_steps=154)
    assert {group["total_steps"] for group in trainer.optimizer.param_groups} == {154}


def test_logs_tell_all_there_is_to_know(make_gpt2, make_trainer):
    trainer = make_trainer(make_gpt2(), logging_steps=3)
    trainer.train()
    logs = training_logs(trainer)
    assert [entry["step"] for entry in logs] == [3, 6, 9, 12]
    for entry in logs:
        assert entry["effective_lr"] == pytest.approx(
            entry["learning_rate"] / math.sqrt(entry["density"])
        )
        assert entry["grad_rms"] > 0
        assert 0 <= entry["mask_churn"] <= 1
        assert "skipped_steps" not in entry
    assert any(entry["mask_churn"] > 0 for entry in logs)


def test_arguments_reach_the_optimizer(make_gpt2, make_trainer):
    trainer = make_trainer(
        make_gpt2(), min_nonzeros=3, sparse_embeddings=False, exclude_parameters=["*.mlp.c_proj.*"],
        include_parameters=["transformer.ln_f.weight"], normalize_gradients="clip", sharkfin=False,
        weight_decay=0.02, adam_beta2=0.97,
    )  # fmt: skip
    groups = trainer.create_optimizer().param_groups
    rule = {name: group for group in groups for name in group["param_names"]}
    assert not rule["transformer.wte.weight"]["sparse"]
    assert not rule["transformer.h.0.mlp.c_proj.weight"]["sparse"]
    assert rule["transformer.ln_f.weight"]["sparse"]
    conv = rule["transformer.h.0.attn.c_attn.weight"]
    assert (conv["min_nonzeros"], conv["row_dim"], conv["weight_decay"]) == (3, 1, 0.02)
    assert (conv["normalize_gradients"], conv["sharkfin"]) == ("clip", False)
    assert (conv["betas"], conv["eps"], conv["lr"]) == ((0.9, 0.97), 0.1, 1e-2)


@pytest.mark.parametrize(
    ("stop_at", "settings"), [(3, {}), (8, {}), (10, {}), (3, RCD), (8, RCD)], ids=str
)
def test_resuming_gives_bit_for_bit_the_run_that_never_stopped(
    stop_at, settings, make_gpt2, make_trainer
):
    """Dropout on and data shuffled; 8 steps an epoch: amid the first, at its end, amid the next."""
    models = [make_gpt2(dropout=0.1, seed=seed) for seed in (0, 0, 9)]
    whole, second, _ = whole_and_resumed(make_trainer, models, stop_at, **settings)
    assert second.state.global_step == 12
    losses = [[entry["loss"] for entry in training_logs(run)] for run in (whole, second)]
    assert losses[0][stop_at:] == losses[1][stop_at - 12 :]


def test_resuming_with_another_schedule_says_that_the_old_one_is_kept(
    make_gpt2, make_trainer, caplog
):
    trainer = make_trainer(make_gpt2(), save_strategy="steps", save_steps=10, max_steps=10)
    trainer.train()
    again = make_trainer(make_gpt2(), target_density=0.5)
    with caplog.at_level(logging.WARNING):
        again.train(resume_from_checkpoint=True)
    assert "target_density=0.125" in caplog.text and "total_steps=10" in caplog.text
    assert training_logs(again)[-1]["density"] == 1 / 8


FALLING = {"sparsifier": "rcd", "rcd_config": {"start_density": 0.5, "block_fraction": 0.25}}


@pytest.mark.parametrize("settings", [{}, FALLING], ids=["topk", "rcd"])
def test_a_checkpoint_without_optimizer_is_resumed_to_the_target_density(
    settings, make_gpt2, make_trainer
):
    settings = {"anneal_end": 0.9, "min_nonzeros": 0, "save_steps": 6, **settings}
    first = make_trainer(
        make_gpt2(), name="first", save_strategy="steps", save_only_model=True, **settings
    )
    first.train()
    second = make_trainer(make_gpt2(seed=9), name="second", **settings)
    second.train(resume_from_checkpoint=str(Path(first.args.output_dir) / "checkpoint-6"))
    whole, resumed = ([log["density"] for log in training_logs(run)] for run in (first, second))
    assert resumed[-6:] == pytest.approx(whole[-6:], abs=0.02)
    assert second.count_nonzeros()["nonzero_fraction"] == pytest.approx(1 / 8, abs=0.01)


@pytest.mark.parametrize(("first", "second"), [({}, RCD), (RCD, {})], ids=["topk", "rcd"])
def test_a_checkpoint_of_the_other_sparsifier_is_refused_before_it_is_loaded(
    first, second, make_gpt2, make_trainer
):
    trainer = make_trainer(make_gpt2(), save_strategy="steps", save_steps=2, max_steps=2, **first)
    trainer.train()
    model = make_gpt2(seed=9)
    before = model.transformer.wte.weight.detach().clone()
    with pytest.raises(ValueError, match="sparsifier"):
        make_trainer(model, **second).train(resume_from_checkpoint=True)
    assert torch.equal(model.transformer.wte.weight, before)


@pytest.mark.parametrize("settings", [{}, RCD], ids=["topk", "rcd"])
def test_a_copy_taken_while_the_model_trains_is_a_model_of_its_own(
    settings, tiny_config, make_trainer
):
    """As that of an exponential moving average: nothing of the training is left in it."""
    copies = []

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            copies.append(copy.deepcopy(model))

    settings = {"target_density": 0.02, "min_nonzeros": 1, **settings}
    trainer = make_trainer(random_model(tiny_config), callbacks=[Keep()], **settings)
    trainer.train()
    model = copies[-1].eval()
    assert not any("forward" in module.__dict__ for module in model.modules())
    ids = torch.arange(8)[None]
    assert torch.equal(model(ids).logits, trainer.model.eval()(ids).logits)
    expected = sparse_layers(to_sparse(trainer.model)).keys()
    assert sparse_layers(to_sparse(model)).keys() == expected
    assert len(expected) > 5


@pytest.mark.parametrize(
    ("accumulate", "settings"),
    [(8, {}), (4, {"sparsifier": "rcd", "rcd_config": {"block_fraction": 0.25}}),
     (4, {"distillation_weight": 0.5, "sparsifier": "none"})],
    ids=str,
)  # fmt: skip
def test_accumulating_gradients_equals_the_larger_batch(
    accumulate, settings, make_gpt2, make_trainer
):
    runs = []
    for parts in (1, accumulate):
        trainer = make_trainer(
            make_gpt2(), name=f"in_{parts}", max_steps=6, per_device_train_batch_size=16 // parts,
            gradient_accumulation_steps=parts, **settings,
        )  # fmt: skip
        trainer.train()
        assert trainer.optimizer.param_groups[0]["steps_taken"] == 6
        runs.append(trainer)
    for p, q in zip(runs[0].model.parameters(), runs[1].model.parameters(), strict=True):
        assert torch.equal(p != 0, q != 0)
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    losses = [[entry["loss"] for entry in training_logs(run)] for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_the_best_model_is_sought_among_the_sparse_ones(make_gpt2, make_trainer):
    # "Best" turned around: the loss falls all the time, so the first, dense model would win.
    trainer = make_trainer(
        make_gpt2(), metric_for_best_model="loss", greater_is_better=True, eval_strategy="steps",
        eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_global_step >= 6
    weight = trainer.model.get_parameter("transformer.h.0.mlp.c_fc.weight")
    assert int(torch.count_nonzero(weight)) == max(nonzero_budget(weight.numel(), 1 / 8), 4 * 96)


def test_none_trains_dense_by_the_same_recipe(make_gpt2, make_trainer):
    trainer = make_trainer(make_gpt2(), sparsifier="none")
    trainer.train()
    log = training_logs(trainer)[-1]
    assert log["density"] == 1.0
    assert log["effective_lr"] == log["learning_rate"]
    assert log["grad_rms"] > 0
    assert log["nonzero_fraction"] > 0.95  # some biases of zero gradient stay zero


def test_an_optimizer_of_ones_own_is_used(make_gpt2, make_trainer, dataset, tmp_path):
    model = make_gpt2()
    own = torch.optim.SGD(model.parameters(), lr=0.1)
    args = make_trainer(model).args
    trainer = SparseTrainer(model, args, train_dataset=dataset, optimizers=(own, None))
    trainer.train()
    assert trainer.optimizer.optimizer is own
    log = training_logs(trainer)[-1]
    assert log["nonzero_fraction"] > 0.9
    assert "density" not in log

    own = TopKAdamW(sparse_param_groups(model), target_density=0.5, total_steps=99)
    trainer = SparseTrainer(model, args, train_dataset=dataset, optimizers=(own, None))
    trainer.train()
    assert own.param_groups[0]["total_steps"] == 99
    assert training_logs(trainer)[-1]["density"] == linear_density(12, 0.5, 0.01, 0.5, 99)


def test_the_optimizer_works_in_a_plain_trainer(make_gpt2, dataset, tmp_path):
    model = make_gpt2()
    optimizer = TopKAdamW(
        sparse_param_groups(model), target_density=1 / 8, total_steps=6, anneal_end=0.5
    )
    args = TrainingArguments(
        str(tmp_path), max_steps=6, report_to="none", use_cpu=True, save_strategy="no",
        disable_tqdm=True, learning_rate=1e-2,
    )  # fmt: skip
    Trainer(model, args, train_dataset=dataset, optimizers=(optimizer, None)).train()
    weight = model.get_parameter("transformer.wte.weight")
    assert int(torch.count_nonzero(weight)) == nonzero_budget(weight.numel(), 1 / 8)


def test_bad_input_is_refused_before_anything_is_written(make_gpt2, make_trainer, tmp_path):
    with pytest.raises(TypeError, match="args"):
        SparseTrainer(make_gpt2(), TrainingArguments(output_dir=str(tmp_path / "run")))
    frozen = make_gpt2().requires_grad_(False)
    for sparsifier in ("topk", "rcd"):
        with pytest.raises(ValueError, match="GPT2LMHeadModel"):
            make_trainer(frozen, sparsifier=sparsifier)
    with pytest.raises(ValueError, match="typo"):
        make_trainer(make_gpt2(), exclude_parameters=["typo"])
    assert not (tmp_path / "run").exists()


def test_the_signature_spells_out_what_trainer_takes():
    theirs = [*signature(Trainer).parameters]
    assert [*signature(SparseTrainer).parameters] == [*theirs, "teacher"]
