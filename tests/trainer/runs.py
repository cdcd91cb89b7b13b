"""What a run of training should leave, and what it logged."""

from pathlib import Path

import torch
from transformers import TrainerCallback

from hf_circuit_sparsity.optim.param_groups import sparse_param_groups
from hf_circuit_sparsity.optim.projection import nonzero_budget


def expected_nonzeros(model, density, **kwargs):
    """Parameter name → what every sparse parameter must hold at this density."""
    expected = {}
    for group in sparse_param_groups(model, **kwargs):
        for name, p in group["params"]:
            if group["sparse"]:
                rows = p.shape[group["row_dim"]] * group["min_nonzeros"]
                budget = p.numel() if density == 1 else nonzero_budget(p.numel(), density)
                expected[name] = max(budget, rows)
    return expected


def nonzeros(model, names):
    parameters = dict(model.named_parameters())
    return {name: int(torch.count_nonzero(parameters[name])) for name in names}


def training_logs(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def assert_same_run(trainer, other):
    for (name, p), q in zip(
        trainer.model.named_parameters(), other.model.parameters(), strict=True
    ):
        assert torch.equal(p, q), name
    first, second = trainer.optimizer.state_dict(), other.optimizer.state_dict()
    assert first["param_groups"] == second["param_groups"]
    assert first["state"].keys() == second["state"].keys()
    for key, state in first["state"].items():
        for name, value in state.items():
            found = second["state"][key][name]
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(found)), (key, name)


class StopAfter(TrainerCallback):
    """Saves a checkpoint and ends the training."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = control.should_training_stop = state.global_step == self.step


def whole_and_resumed(make_trainer, models, stop_at, **settings):
    """A run, and the same run stopped after a step and taken up again, which must end alike.

    Args:
        models: of the whole run, of its first part, and any other one, so that nothing but the
            checkpoint can make the runs agree.

    Returns:
        The trainers of the whole run and of the second part, and the checkpoint's folder.
    """
    whole = make_trainer(models[0], name="whole", **settings)
    whole.train()
    stop = [StopAfter(stop_at)]
    first = make_trainer(models[1], callbacks=stop, name="halves", **settings)
    first.train()
    assert first.state.global_step == stop_at
    checkpoint = Path(first.args.output_dir) / f"checkpoint-{stop_at}"
    second = make_trainer(models[2], name="halves", **settings)
    second.train(resume_from_checkpoint=str(checkpoint))
    assert_same_run(whole, second)
    return whole, second, checkpoint
