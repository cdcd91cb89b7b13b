"""Metrics loaded by their Hub id, here and in a process without this package."""

import os
import subprocess
import sys

import evaluate
import pytest
from huggingface_hub import HfApi

from hf_circuit_sparsity.metrics import METRICS, metric_path
from hf_circuit_sparsity.metrics.space import push_metric

INPUTS = {
    "task_loss": {"predictions": [[2.0, 0.0], [0.5, 1.5]], "references": [0, 1]},
    "circuit_faithfulness": {"predictions": [[2.0, 0.0]], "references": [[3.0, 0.0]]},
    "circuit_size": {"nodes": [11, 44], "edges": [10, 40]},
}


@pytest.mark.parametrize("name", METRICS)
def test_by_hub_id(hub_server, name, tmp_path):
    push_metric(name, f"ada/{name}")
    files = HfApi().list_repo_files(f"ada/{name}", repo_type="space")
    assert "README.md" in files and f"{name}.py" in files and "__init__.py" not in files
    from_hub, here = (
        evaluate.load(source, cache_dir=str(tmp_path))
        for source in (f"ada/{name}", metric_path(name))
    )
    assert from_hub.compute(**INPUTS[name]) == here.compute(**INPUTS[name])


def test_where_the_package_is_not(hub_server, tmp_path):
    push_metric("task_loss", "ada/task_loss")
    script = f"""
import evaluate, sys
print(evaluate.load("ada/task_loss").compute(**{INPUTS["task_loss"]!r}))
assert not any(name.startswith("hf_circuit_sparsity") for name in sys.modules)
"""
    environment = {**os.environ, "PYTHONPATH": "", "PYTHONNOUSERSITE": "1"}
    command = [sys.executable, "-c", script]
    printed = subprocess.check_output(command, cwd=tmp_path, env=environment, text=True)
    assert "'task_loss': 0.2" in printed and "'task_accuracy': 1.0" in printed


def test_a_name_that_evaluate_would_not_find_is_refused(hub_server):
    with pytest.raises(ValueError, match="repo_id"):
        push_metric("task_loss", "ada/loss")
