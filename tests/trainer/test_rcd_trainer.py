"""`SparseTrainer` with sparsifier="rcd"."""

import json
from pathlib import Path

import pytest
import torch
from transformers import HfArgumentParser, TrainerCallback

from hf_circuit_sparsity.optim.param_groups import sparse_param_groups
from hf_circuit_sparsity.optim.projection import nonzero_budget
from hf_circuit_sparsity.optim.rcd.config import RCDConfig
from hf_circuit_sparsity.optim.rcd.optimizer import RCDSparseOptimizer
from hf_circuit_sparsity.trainer.sparse_config import SparseTrainingArguments
from tests.conftest import random_model


def budgets(model):
    """Name → most nonzeros a sparse parameter may have at the target of `make_trainer`."""
    found = {}
    for group in sparse_param_groups(model):
        for name, p in group["params"]:
            if group["sparse"]:
                rows = p.shape[group["row_dim"]] * group["min_nonzeros"]
                found[name] = max(nonzero_budget(p.numel(), 1 / 8), rows)
    return found


def training_logs(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


class Watcher(TrainerCallback):
    """Checks that the budget holds after every step and that no full gradient ever existed."""

    def __init__(self):
        self.steps = 0

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        for p in model.parameters():
            assert p.grad is None or p.ndim < 2 or p is getattr(model, "bigram_table", None)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        for name, budget in budgets(model).items():
            assert int(torch.count_nonzero(model.get_parameter(name))) <= budget
        self.steps += 1


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "circuitgpt"])
def test_trains_within_the_budget_and_without_full_gradients(
    architecture, make_gpt2, make_llama, tiny_config, make_trainer
):
    make = {
        "gpt2": make_gpt2, "llama": make_llama, "circuitgpt": lambda: random_model(tiny_config)
    }  # fmt: skip
    model, watcher = make[architecture](), Watcher()
    trainer = make_trainer(
        model, callbacks=[watcher], sparsifier="rcd", rcd_config={"block_fraction": 0.25}
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert watcher.steps == 12
    assert isinstance(trainer.optimizer.optimizer, RCDSparseOptimizer)
    logs = training_logs(trainer)
    assert [entry["block_number"] for entry in logs] == list(range(2, 14))
    for entry in logs:
        # Biases start at zero and have budgets of their own.
        assert 0.1 < entry["density"] <= 0.25
        assert entry["nonzero_fraction"] == pytest.approx(entry["density"], abs=1e-9)
        assert 0 <= entry["mask_churn"] <= 1
        assert entry["grad_rms"] > 0
        assert "grad_norm" not in entry
    assert any(entry["mask_churn"] > 0 for entry in logs)
    assert trainer.evaluate()["eval_loss"] < before
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("stop_at", [3, 8])
def test_resuming_gives_bit_for_bit_the_run_that_never_stopped(stop_at, make_gpt2, make_trainer):
    settings = {
        "sparsifier": "rcd",
        "rcd_config": {"selection": "magnitude", "block_steps": 2, "block_fraction": 0.25},
    }
    whole = make_trainer(make_gpt2(dropout=0.1), name="whole", **settings)
    whole.train()

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_save = control.should_training_stop = state.global_step == stop_at

    first = make_trainer(make_gpt2(dropout=0.1), callbacks=[Stop()], name="halves", **settings)
    first.train()
    checkpoint = Path(first.args.output_dir) / f"checkpoint-{stop_at}"
    second = make_trainer(make_gpt2(dropout=0.1, seed=9), name="halves", **settings)
    second.train(resume_from_checkpoint=str(checkpoint))
    assert second.state.global_step == 12
    for (name, p), q in zip(whole.model.named_parameters(), second.model.parameters(), strict=True):
        assert torch.equal(p, q), name
    states = [trainer.optimizer.state_dict() for trainer in (whole, second)]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    for key, state in states[0]["state"].items():
        for name, value in state.items():
            other = states[1]["state"][key][name]
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other)), (key, name)
    losses = [[entry["loss"] for entry in training_logs(trainer)] for trainer in (whole, second)]
    assert losses[0][stop_at:] == losses[1][-(12 - stop_at) :]


def test_accumulating_gradients_equals_the_larger_batch(make_gpt2, make_trainer):
    runs = []
    for batch, accumulate in ((16, 1), (4, 4)):
        trainer = make_trainer(
            make_gpt2(),
            name=f"batch{batch}",
            max_steps=6,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulate,
            sparsifier="rcd",
            rcd_config={"block_fraction": 0.25},
        )
        trainer.train()
        assert trainer.optimizer.param_groups[0]["steps_taken"] == 6
        runs.append(trainer)
    for p, q in zip(runs[0].model.parameters(), runs[1].model.parameters(), strict=True):
        assert torch.equal(p != 0, q != 0)
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_mixed_precision(make_llama, make_trainer):
    trainer = make_trainer(
        make_llama(), sparsifier="rcd", bf16=True, rcd_config={"block_fraction": 0.25}
    )
    trainer.train()
    logs = training_logs(trainer)
    assert logs[-1]["loss"] < logs[0]["loss"]
    assert "skipped_steps" not in logs[-1]


def test_settings_reach_the_optimizer_and_the_start(make_gpt2, make_trainer):
    model = make_gpt2()
    largest = model.transformer.wte.weight.detach().abs().flatten().topk(50)
    settings = {
        "selection": "gradient",
        "block": "columns",
        "block_fraction": 0.5,
        "block_steps": 4,
        "update": "plain",
        "clip_threshold": 1e-3,
        "l1": 1e-4,
        "greedy_fraction": 0.2,
    }
    config = RCDConfig(**settings, init="magnitude")
    trainer = make_trainer(model, sparsifier="rcd", rcd_config=config)
    group = trainer.create_optimizer().param_groups[0]
    expected = {**settings, "target_density": 1 / 8, "seed": 3}
    assert {name: group[name] for name in expected} == expected
    kept = model.transformer.wte.weight.detach().abs().flatten()[largest.indices]
    assert torch.equal(kept, largest.values)  # not rescaled: these have been trained


def test_training_twice_goes_on_and_an_error_leaves_the_model_usable(make_gpt2, make_trainer):
    class Fail(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise RuntimeError("stopped")

    model = make_gpt2()
    trainer = make_trainer(model, sparsifier="rcd", max_steps=2, callbacks=[fail := Fail()])
    with pytest.raises(RuntimeError, match="stopped"):
        trainer.train()
    assert not any("forward" in module.__dict__ for module in model.modules())
    trainer.remove_callback(fail)
    trainer.train()
    assert trainer.optimizer.param_groups[0]["steps_taken"] == 3


def test_nan_gradients_stop_the_run_at_the_third(make_gpt2, make_trainer):
    class Break(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                model.transformer.ln_f.weight.data.fill_(float("nan"))

    trainer = make_trainer(make_gpt2(), sparsifier="rcd", callbacks=[Break()])
    with pytest.raises(FloatingPointError, match="3 steps in a row"):
        trainer.train()
    assert training_logs(trainer)[-1]["skipped_steps"] == 2


def test_command_line(tmp_path):
    parser = HfArgumentParser(SparseTrainingArguments)
    settings = '{"selection": "magnitude", "block_fraction": 0.03}'
    for flag in ("--rcd_config", "--rcd-config"):
        line = ["--output_dir", str(tmp_path), "--sparsifier", "rcd", flag, settings]
        (args,) = parser.parse_args_into_dataclasses(line)
        assert args.rcd_config == RCDConfig(selection="magnitude", block_fraction=0.03)
        assert json.loads(args.to_json_string())["rcd_config"]["block_fraction"] == 0.03


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"rcd_config": {"block_fraction": 0.0}}, "block_fraction"),
        ({"rcd_config": {"selection": "best"}}, "selection"),
        ({"rcd_config": {"init": "dense"}}, "init"),
        ({"rcd_config": {"start_density": 1e-3}}, "start_density"),
        ({"rcd_config": {"blocks": 3}}, "blocks"),
        ({"rcd_config": "block_fraction=0.5"}, "rcd_config"),
        ({"rcd_config": [1]}, "rcd_config"),
        ({"max_grad_norm": 1.0}, "max_grad_norm"),
        ({"torch_compile": True}, "torch_compile"),
    ],
)
def test_bad_values_are_named(arguments, word, tmp_path):
    with pytest.raises(ValueError, match=word):
        SparseTrainingArguments(output_dir=str(tmp_path / "out"), sparsifier="rcd", **arguments)
    assert not (tmp_path / "out").exists()


def test_models_without_layers_to_descend_on_are_refused(make_trainer, make_gpt2):
    with pytest.raises(ValueError, match="no trainable parameter to make sparse"):
        make_trainer(make_gpt2().requires_grad_(False), sparsifier="rcd")
