"""The metrics' cards: valid metadata, and examples that run as printed."""

import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import metadata_load
from transformers import Trainer, TrainingArguments

from hf_circuit_sparsity.circuits.task_scores import all_pair_logits, binary_loss
from hf_circuit_sparsity.metrics import METRICS, metric_path
from tests.circuits.planted import on_off_task, planted_model, word_tokenizer


def examples(name):
    card = (Path(metric_path(name)) / "README.md").read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)


@pytest.mark.parametrize("name", METRICS)
def test_card(name, capsys):
    metadata = metadata_load(Path(metric_path(name)) / "README.md")
    assert metadata["license"] == "apache-2.0" and metadata["sdk"] == "static"
    assert {"evaluate", "metric"} <= set(metadata["tags"])
    exec(compile(examples(name)[0], f"{name}/README.md", "exec"), {})
    printed = eval(capsys.readouterr().out)
    assert printed and all(isinstance(value, float) for value in printed.values())


def test_task_loss_with_a_trainer(tmp_path):
    names = {}
    exec(compile(examples("task_loss")[1], "task_loss/README.md", "exec"), names)
    model, task = planted_model(), on_off_task()
    args = TrainingArguments(tmp_path, per_device_eval_batch_size=32, report_to="none")
    trainer = Trainer(model, args, **names["for_trainer"](task, word_tokenizer()))
    metrics = trainer.evaluate()
    with torch.no_grad():
        pairs = all_pair_logits(model, task.tensors("test"))
    assert metrics["eval_task_loss"] == pytest.approx(binary_loss(pairs).item(), abs=1e-5)
    assert metrics["eval_task_accuracy"] == 1.0
