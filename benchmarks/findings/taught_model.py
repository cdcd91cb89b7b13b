"""A larger model for the CPU: real Python, an eighth of it the tasks' training prompts, answered.

Trained on the token file of `benchmarks.gpu.corpus`, from its bigram counts, by the quickstart's
recipe; a run that was stopped goes on from its last checkpoint. Then the twenty tasks, on prompts
whose templates and names are in no lesson.
"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from transformers import AutoTokenizer, set_seed

from hf_circuit_sparsity.commands.training import SUMMARY_NAME, newest_if_any, train_model
from hf_circuit_sparsity.modeling.configuration_circuitgpt import CircuitGPTConfig
from hf_circuit_sparsity.modeling.modeling_circuitgpt import CircuitGPTForCausalLM
from hf_circuit_sparsity.tasks.definitions.base import DEFINITIONS
from hf_circuit_sparsity.trainer.sparse_config import SparseTrainingArguments

from ..experiment import Experiment, machine, stored, table
from ..gpu.evaluate import task_scores, tasks_told
from ..gpu.keep import held_out_loss, save_small
from ..gpu.sizes import TokenBlocks
from .trained_models import with_lessons

BLOCK_SIZE = 256
BATCH_SIZE = 8
LESSONS = 1 / 8
PROMPTS = 512
TABLE_DENSITY = 0.1
"""Of the bigram table of the model that is kept."""


def run(experiment: Experiment) -> str:
    """Train the model as far as it is not, and measure the tasks; returns the report."""
    o, folder = experiment.options, experiment.folder
    torch.set_num_threads(o.threads)
    if not (folder / SUMMARY_NAME).is_file() and not experiment.stored_only:
        train(experiment)
    if o.keep and not (Path(o.keep) / "config.json").is_file():
        keep(folder, Path(o.keep), Path(o.data))
    of = Path(o.keep) if o.keep else folder
    measured = stored(folder / f"{of.name}.json", lambda: measure(of, Path(o.data)))
    summary = stored(folder / SUMMARY_NAME, dict)
    return "\n\n".join([
        "# A larger model, trained on a CPU",
        __doc__.strip().split("\n\n", 1)[1],
        f"Measured on: {machine()}. One seed, one learning rate.",
        table([{
            "steps": f"{o.steps:,}",
            "tokens": f"{o.steps * BATCH_SIZE * BLOCK_SIZE:,}",
            "held-out loss": f"{summary['loss']:.3f}",
            "as it is kept": f"{measured['loss']:.3f}" if o.keep else "–",
            "density": f"1/{1 / summary['density']:.1f}",
            "nonzeros": f"{summary['nonzeros']:,}",
        }]),
        tasks_told(measured["tasks"], PROMPTS),
    ])  # fmt: skip


def train(experiment: Experiment) -> None:
    """Train from the beginning, or from the last checkpoint that is whole."""
    o, folder = experiment.options, experiment.folder
    tokenizer = AutoTokenizer.from_pretrained(Path(o.data) / "tokenizer")
    blocks = DatasetDict({
        split: _dataset(TokenBlocks(Path(o.data) / f"{split}.bin", BLOCK_SIZE).blocks)
        for split in ("train", "validation")
    })  # fmt: skip
    set_seed(0)
    model = CircuitGPTForCausalLM(
        CircuitGPTConfig(
            d_model=o.d_model,
            n_layer=o.layers,
            d_head=16,
            block_size=BLOCK_SIZE,
            vocab_size=len(tokenizer),
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    train_model(
        model,
        tokenizer,
        with_lessons(blocks, sorted(DEFINITIONS), tokenizer, LESSONS),
        SparseTrainingArguments(
            output_dir=str(folder),
            max_steps=o.steps,
            per_device_train_batch_size=BATCH_SIZE,
            per_device_eval_batch_size=BATCH_SIZE,
            learning_rate=o.rate,
            target_density=1 / 64,
            anneal_end=0.4,
            logging_steps=max(1, o.steps // 80),
            save_steps=max(1, o.steps // 16),
            save_total_limit=1,
            report_to="none",
        ),
        resume_from_checkpoint=newest_if_any(folder),
        start_at_bigrams=True,
    )


def keep(folder: Path, kept: Path, data: Path) -> None:
    """Save it as small as `benchmarks.gpu.keep` makes a model, and what it was trained on."""
    model = CircuitGPTForCausalLM.from_pretrained(folder, dtype="float32")
    save_small(model, AutoTokenizer.from_pretrained(folder), kept, TABLE_DENSITY)
    shutil.copyfile(data / "manifest.json", kept / "training_data.json")


def measure(folder: Path, data: Path) -> dict[str, Any]:
    """The tasks, and nats per token on the blocks that training was evaluated on."""
    model = CircuitGPTForCausalLM.from_pretrained(folder, dtype="float32", sparse=True).eval()
    blocks = TokenBlocks(data / "validation.bin", BLOCK_SIZE).spread(512)
    return {
        "tasks": task_scores(model, AutoTokenizer.from_pretrained(folder), PROMPTS),
        "loss": held_out_loss(model, blocks),
    }


def _dataset(blocks: np.ndarray) -> Dataset:
    rows = blocks.astype(np.int32)
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


def main() -> None:
    """The command line."""
    Experiment.main(
        run, __doc__, "taught_model", "runs/taught_model", data="gpu_data", d_model=512, layers=4,
        steps=8000, rate=4e-3, threads=2, keep="",
    )  # fmt: skip


if __name__ == "__main__":
    main()
