"""What trackers are told, read back from what they wrote."""

from transformers import TrainerCallback

from hf_circuit_sparsity import SparseTrainer


class Logs(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs, **kwargs):
        self.seen.append((state.global_step, dict(logs)))


def test_tensorboard_gets_every_number_of_the_log(make_gpt2, make_trainer, monkeypatch, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    logs = Logs()
    trainer: SparseTrainer = make_trainer(
        make_gpt2(), [logs], report_to="tensorboard", max_steps=4, logging_steps=2
    )
    trainer.train()
    trainer.evaluate()
    written = EventAccumulator(str(tmp_path / "events"))
    written.Reload()
    names = {"density", "nonzeros", "nonzero_fraction", "mask_churn", "grad_rms", "effective_lr"}
    assert {f"train/{name}" for name in names} <= set(written.Tags()["scalars"])
    assert "eval/perplexity" in written.Tags()["scalars"]
    steps = [(step, log) for step, log in logs.seen if "density" in log]
    assert [step for step, _ in steps] == [2, 4]
    for name in names:
        events = written.Scalars(f"train/{name}")
        told = [(step, log[name]) for step, log in steps]
        assert [event.step for event in events] == [step for step, _ in told]
        for event, (_, value) in zip(events, told, strict=True):
            assert abs(event.value - value) <= 1e-6 * abs(value)
