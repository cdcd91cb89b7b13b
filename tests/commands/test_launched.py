"""`hf-circuit-sparsity train` under `accelerate launch`, by the configs in `examples/accelerate/`.

Where a config asks for GPUs the processes run on the CPU here.
"""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from hf_circuit_sparsity import CircuitGPTForCausalLM, extract_mask
from tests.commands.test_own_data import SMALL, TALES

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "examples" / "accelerate").glob("*.yaml"))


def test_there_is_a_config_for_each_kind_and_accelerate_reads_it():
    kinds = {path.stem: load_config_from_file(str(path)).distributed_type for path in CONFIGS}
    assert kinds == {
        "cpu_two_processes": "MULTI_GPU", "ddp": "MULTI_GPU", "fsdp2": "FSDP", "one_gpu": "NO"
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_a_model_is_trained_and_goes_on_from_its_checkpoint(config, tmp_path):
    (tmp_path / "tales.txt").write_text("\n\n".join(TALES), encoding="utf-8")
    train = [*SMALL, "--dataset", "tales.txt", "--output-dir", "run", "--save-steps", "5"]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config),
               "--main_process_port", "0", "-m", "hf_circuit_sparsity.cli", "train",
               *train]  # fmt: skip
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"
    }  # fmt: skip
    for more in ("--max-steps 10", "--max-steps 15 --resume-from-checkpoint run/checkpoint-10"):
        done = subprocess.run(
            [*command, *shlex.split(more)], cwd=tmp_path, env=environment, check=True,
            capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert done.stdout.count("validation loss") == 1  # of one process
    processes = 1 if config.stem == "one_gpu" else 2
    summary = json.loads((tmp_path / "run" / "training_summary.json").read_text())
    assert summary["steps"] == 15 and summary["tokens"] == 15 * 4 * 16 * processes
    saved = CircuitGPTForCausalLM.from_pretrained(tmp_path / "run")
    assert extract_mask(saved).density() <= 0.51
    is_sharded = (tmp_path / "run" / "checkpoint-15" / "pytorch_model_fsdp_0").is_dir()
    assert is_sharded == (config.stem == "fsdp2")
