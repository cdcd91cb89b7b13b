"""`SparseTrainer` with sparsifier="rcd"."""

import pytest
import torch
from transformers import TrainerCallback

from hf_circuit_sparsity import RCDConfig, RCDSparseOptimizer
from tests.conftest import random_model
from tests.trainer.runs import expected_nonzeros, training_logs


class Watcher(TrainerCallback):
    """Checks that the budget holds after every step and that no full gradient ever existed."""

    def __init__(self):
        self.steps = 0

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        for p in model.parameters():
            assert p.grad is None or p.ndim < 2 or p is getattr(model, "bigram_table", None)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        for name, budget in expected_nonzeros(model, 1 / 8).items():
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


def test_settings_reach_the_optimizer_and_the_start(make_gpt2, make_trainer):
    model = make_gpt2()
    largest = model.transformer.wte.weight.detach().abs().flatten().topk(50)
    settings = {
        "selection": "gradient", "block": "columns", "block_fraction": 0.5, "block_steps": 4,
        "update": "plain", "clip_threshold": 1e-3, "l1": 1e-4, "greedy_fraction": 0.2,
    }  # fmt: skip
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
