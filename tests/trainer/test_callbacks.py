import os
import signal
import threading
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from hf_circuit_sparsity.trainer.callbacks import InterruptCallback, SparsityMonitor


class PressCtrlC(TrainerCallback):
    def __init__(self, *steps, signal=signal.SIGINT):
        self.steps, self.signal = steps, signal
        self.saves = 0

    def on_save(self, args, state, control, **kwargs):
        self.saves += 1

    def on_step_begin(self, args, state, control, **kwargs):
        for _ in range(self.steps.count(state.global_step)):
            os.kill(os.getpid(), self.signal)


@pytest.fixture(autouse=True)
def handlers_are_put_back():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    yield
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize(
    ("evaluated", "due"),
    [
        ({"eval_strategy": "epoch"}, []),
        ({"eval_strategy": "steps", "eval_steps": 5}, [5]),
    ],
)
def test_ctrl_c_saves_and_resuming_completes_the_run(
    evaluated, due, make_gpt2, make_trainer, capsys
):
    whole = make_trainer(make_gpt2(dropout=0.1), name="whole", **evaluated)
    whole.train()

    interrupt = InterruptCallback()
    callbacks = [PressCtrlC(4), interrupt]
    trainer = make_trainer(make_gpt2(dropout=0.1), callbacks=callbacks, name="stopped", **evaluated)
    trainer.train()
    assert interrupt.interrupted
    assert trainer.state.global_step == 5  # the step under way is finished
    assert "Ctrl-C again" in capsys.readouterr().err
    evaluations = [e["step"] for e in trainer.state.log_history if "eval_loss" in e]
    assert evaluations == due  # one that is due takes place, the cut off epoch's does not
    folders = [p.name for p in Path(trainer.args.output_dir).glob("checkpoint-*")]
    assert folders == ["checkpoint-5"]
    assert callbacks[0].saves == 1

    model = make_gpt2(dropout=0.1, seed=5)
    resumed = make_trainer(model, callbacks=[interrupt], name="stopped", **evaluated)
    resumed.train(resume_from_checkpoint=True)
    assert not interrupt.interrupted
    assert resumed.state.global_step == 12 and interrupt.first_step == 5
    for p, q in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_schedulers_signal_saves_too(make_gpt2, make_trainer):
    interrupt = InterruptCallback()
    trainer = make_trainer(make_gpt2(), callbacks=[PressCtrlC(4, signal=signal.SIGTERM), interrupt])
    trainer.train()
    assert interrupt.interrupted and trainer.state.global_step == 5
    assert [p.name for p in Path(trainer.args.output_dir).glob("*-*")] == ["checkpoint-5"]


def test_second_ctrl_c_stops_at_once(make_gpt2, make_trainer):
    trainer = make_trainer(make_gpt2(), callbacks=[PressCtrlC(2, 2), InterruptCallback()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.state.global_step == 2


def test_a_run_that_is_not_interrupted_is_left_alone(make_gpt2, make_trainer):
    interrupt = InterruptCallback()
    trainer = make_trainer(make_gpt2(), callbacks=[interrupt])
    trainer.train()
    assert trainer.state.global_step == 12
    assert not interrupt.interrupted
    assert list(Path(trainer.args.output_dir).iterdir()) == []
    interrupt.restore()  # harmless


def test_training_in_another_thread_keeps_the_handler(make_gpt2, make_trainer):
    trainer = make_trainer(make_gpt2(), callbacks=[InterruptCallback()], max_steps=2)
    thread = threading.Thread(target=trainer.train)
    thread.start()
    thread.join()
    assert trainer.state.global_step == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_counts_and_churn(dtype):
    a, b = (
        torch.zeros(3, 5).to(dtype),
        torch.zeros(7).to(dtype),
    )  # sizes that do not fill whole bytes
    a[0, :4] = 1.0
    b[6] = -2.0
    monitor = SparsityMonitor([a, b])
    assert monitor.measure() == {
        "nonzeros": 5,
        "nonzero_fraction": pytest.approx(5 / 22),
        "mask_churn": 0.0,
    }
    a[0, :2] = 0.0  # two die, one is born, three stay
    b[0] = 3.0
    assert monitor.measure()["mask_churn"] == pytest.approx(1 / 4)
    assert monitor.measure()["mask_churn"] == 0.0
    a.zero_(), b.zero_()
    assert monitor.measure() == {"nonzeros": 0, "nonzero_fraction": 0.0, "mask_churn": 0.0}
