"""`hf-circuit-sparsity quickstart`: from nothing to a picture of a circuit, on a laptop."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import set_seed

from ..circuits.ablation import in_eval_mode
from ..circuits.circuit import Circuit
from ..circuits.evaluation.verification import verify_circuit
from ..circuits.pruning.config import PruningConfig
from ..circuits.pruning.find import TaskNotLearnedError
from ..circuits.task_scores import all_pair_logits, binary_accuracy
from ..files import check_can_write, new_folder, temporary_name, write_json
from ..modeling.configuration_circuitgpt import CircuitGPTConfig
from ..modeling.modeling_circuitgpt import CircuitGPTForCausalLM
from ..optim.param_groups import sparse_param_groups
from ..optim.topk_adamw import TopKAdamW
from ..tasks.adversarial import has_distractors, with_distractors
from ..tasks.binary_task import BinaryTask
from ..tasks.load import check_tasks, load_task
from ..trainer.sparse_config import SparseTrainingArguments
from .console import check_can_draw, on_terminal, quiet_libraries, say, table
from .loading import read_corpus
from .prune import circuit_rows, prune_model
from .training import SUMMARY_NAME, newest_if_any, prepare_data, train_model, training_rows

D_MODEL = 128
N_LAYER = 2
# Of a model with half of the vocabulary, MLPs half as wide and a quarter of the tokens, trained in
# half the time, circuits were larger: 13 to 54 nodes where those of this one had 9 to 14, by one
# search.
VOCAB_SIZE = 2048
BATCH_SIZE = 16
BLOCK_SIZE = 128
DENSITY = 0.05
STEPS = 2500
# That of `benchmarks.findings.trained_models`; the bigram table begins at zero.
LEARNING_RATE = 2e-2
# Target losses of the circuit, in nats, tried in this order. The paper's is 0.15.
TARGETS = (0.3, 0.5)
# Fewer and smaller updates of masks than the paper's, and a higher price of nodes for that.
SEARCH = {
    "max_steps": 150, "batch_size": 16, "selection_prompts": 512, "node_penalty": 8e-3,
}  # fmt: skip
# Without them the circuit is smaller and guesses where the other answer stands before.
DISTRACTOR_FRACTION = 0.5
# The checks in under a minute: fewer prompts and draws than `verify`, no search from other seeds.
QUICK_CHECKS = {"prompts": 128, "random_circuits": 4, "subsets": 3, "supersets": 4}
SETTINGS_NAME = "quickstart.json"


@dataclass(frozen=True)
class QuickstartSettings:
    """What a quickstart folder was started with; a resumed run must ask for the same.

    Attributes:
        minutes: of training, turned into steps by timing a few; None for as many steps as the
            README's numbers are from.
        task: as for [`load_task`].
        seed: of tasks, model, training and pruning.
        corpus: folder of Python files; the standard library if None.
    """

    minutes: float | None = None
    task: str = "single_double_quote"
    seed: int = 0
    corpus: str | None = None


def run_quickstart(output_dir: str, settings: QuickstartSettings) -> dict[str, Any]:
    """Train a small sparse model on Python and cut one circuit out of it.

    The same call on the same folder continues a run that was stopped.

    Args:
        output_dir: of `model/` with the checkpoints, `circuit/` and `summary.json`.
        settings: what to train and to cut out.

    Returns:
        The numbers of `summary.json`.

    Raises:
        ValueError: the folder holds a quickstart with other settings, or a bad corpus or task.
        Interrupted: after Ctrl-C; the folder can be resumed.
    """
    quiet_libraries()
    check_can_draw()
    if settings.minutes is not None and not settings.minutes > 0:
        raise ValueError(f"minutes={settings.minutes:g} was passed, but it must be above 0.")
    parts = _Parts()
    folder = Path(output_dir)
    check_tasks([settings.task])
    check_can_write(folder)
    stored = _stored_settings(folder, settings)

    say("1/5  Reading Python and learning its tokens")
    corpus = read_corpus(settings.corpus)
    model_folder = folder / "model"
    kept = folder / "tokenizer"
    tokenizer, blocks = prepare_data(
        corpus, BLOCK_SIZE, str(kept) if kept.is_dir() else None, VOCAB_SIZE
    )
    task = load_task(settings.task, tokenizer, seed=settings.seed, max_length=BLOCK_SIZE)
    # Before all else, for it says that the folder is a quickstart's.
    steps = stored.get("steps") or (STEPS if settings.minutes is None else None)
    write_json(folder / SETTINGS_NAME, {**asdict(settings), "steps": steps})
    if not kept.is_dir():
        with new_folder(kept) as new:
            tokenizer.save_pretrained(new)

    config = CircuitGPTConfig(
        d_model=D_MODEL, n_layer=N_LAYER, block_size=BLOCK_SIZE, vocab_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    parts.end("reading")
    if (model_folder / SUMMARY_NAME).is_file():
        say("2/5  Training: done before")
        trained = json.loads((model_folder / SUMMARY_NAME).read_text())
    else:
        seconds = _seconds_per_step(config, blocks["train"])
        if steps is None:
            steps = max(50, int(60 * settings.minutes / seconds))
            write_json(folder / SETTINGS_NAME, {**asdict(settings), "steps": steps})
        say(
            f"2/5  Training a transformer of {N_LAYER} layers and width {D_MODEL} for {steps:,} "
            f"steps, about {steps * seconds / 60:.0f} min"
        )
        say(f"     keeping {DENSITY:.0%} of its weights in the end")
        set_seed(settings.seed)
        trained = train_model(
            CircuitGPTForCausalLM(config),
            tokenizer,
            blocks,
            _training_arguments(model_folder, steps, settings.seed),
            resume_from_checkpoint=newest_if_any(model_folder),
            measure=_task_accuracy(task),
        )
    parts.end("training")

    say(f"3/5  Cutting out the circuit of {task.name}")
    model = CircuitGPTForCausalLM.from_pretrained(model_folder).eval()
    circuit = _prune(model, task, settings.seed, folder / "circuit", blocks["train"])
    parts.end("circuit")
    say("4/5  Asking whether it may be believed")
    verdict = _check(circuit, model, task, folder / "circuit")
    parts.end("checks")
    say("5/5  Done")
    misled = _misled(circuit)
    summary = {**trained, **circuit.metrics, **misled, **parts.seconds}
    write_json(folder / "summary.json", summary)
    _print_summary(folder, trained, circuit, misled, parts, verdict)
    return summary


class _Parts:
    """How long the parts of a run took: `seconds` are `NAME_seconds` of the clock and
    `NAME_cpu_seconds` of all threads, and the same of `total`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._started = self._part = self._now()

    @staticmethod
    def _now() -> tuple[float, float]:
        return time.perf_counter(), time.process_time()

    def end(self, name: str) -> None:
        """The part of this name, which began where the last one ended, ends now."""
        now = self._now()
        for of, since in ((name, self._part), ("total", self._started)):
            self.seconds[f"{of}_seconds"] = now[0] - since[0]
            self.seconds[f"{of}_cpu_seconds"] = now[1] - since[1]
        self._part = now

    def row(self, kind: str) -> str:
        """Minutes of the clock (`seconds`) or of CPU (`cpu_seconds`), in all and by part."""
        names = ("total", "reading", "training", "circuit", "checks")
        total, *rest = (f"{self.seconds[f'{name}_{kind}'] / 60:.1f}" for name in names)
        return f"{total}: {', '.join(map(' '.join, zip(names[1:], rest, strict=True)))}"


def _prune(
    model: CircuitGPTForCausalLM,
    task: BinaryTask,
    seed: int,
    folder: Path,
    reference: Dataset,
) -> Circuit:
    """Find the circuit at the first target loss that the model itself reaches.

    With another seed, library or number of minutes the model may not reach the first target.
    """
    fraction = _distractor_fraction(task, seed)
    for target in TARGETS:
        config = PruningConfig(
            seed=seed, target_loss=target, distractor_fraction=fraction, **SEARCH
        )
        try:
            return prune_model(model, task, folder, config, reference)
        except TaskNotLearnedError:
            if target == TARGETS[-1]:
                raise
            say(f"     the model itself does not reach a loss of {target:g}; trying a higher one")


def _distractor_fraction(task: BinaryTask, seed: int) -> float:
    """Of the prompts that the circuit is searched with, as far as the task has such that fit."""
    if has_distractors(task):
        try:
            with_distractors(task, DISTRACTOR_FRACTION, seed=seed, max_length=BLOCK_SIZE)
        except ValueError as error:
            say(f"     {error}")
        else:
            return DISTRACTOR_FRACTION
    return 0.0


def _check(circuit: Circuit, model: CircuitGPTForCausalLM, task: BinaryTask, folder: Path) -> str:
    """The verdict on the circuit; its numbers are stored with it."""
    try:
        checked = verify_circuit(
            circuit, model, task, others=[], progress=on_terminal(), **QUICK_CHECKS
        )
    except ValueError as error:  # no nodes, or a model that guesses: said, as the circuit is there
        return str(error)
    circuit.save_pretrained(folder)
    return checked.verdict()


def _misled(circuit: Circuit) -> dict[str, float]:
    """How often model and circuit are right on prompts that may mislead the circuit, as far as the
    task has such: a finished string of the other quote stands on the line before, for example."""
    found = {}
    for name, check in circuit.verification.items():
        of, _, where = name.partition("accuracy: ")
        if where:
            who = of.strip() or "circuit"
            found[f"{who} right, {where.replace('_', ' ')}"] = check["value"]
    return found


def _stored_settings(folder: Path, settings: QuickstartSettings) -> dict[str, Any]:
    """The settings that the folder was started with, or none; refuses to mix two runs."""
    path = folder / SETTINGS_NAME
    if not path.is_file():
        begun = temporary_name(path)  # of a quickstart that was killed at once
        if folder.is_dir() and any(other != begun for other in folder.iterdir()):
            raise ValueError(
                f"{folder} is not empty and holds no quickstart; choose another --output-dir."
            )
        return {}
    stored = json.loads(path.read_text(encoding="utf-8"))
    for name, value in asdict(settings).items():
        if stored.get(name) != value:
            raise ValueError(
                f"{folder} holds a quickstart with {name}={stored.get(name)!r}, but {value!r} was "
                "asked for; pass the same, choose another --output-dir, or delete the folder."
            )
    return stored


def _seconds_per_step(config: CircuitGPTConfig, train: Dataset, timed: int = 12) -> float:
    """Median seconds of a training step on this machine, timed on a throwaway model."""
    model = CircuitGPTForCausalLM(config)
    optimizer = TopKAdamW(sparse_param_groups(model), target_density=DENSITY, total_steps=10**6)
    batches = torch.tensor(train[: BATCH_SIZE * timed]["input_ids"]).split(BATCH_SIZE)
    times = []
    for batch in batches:
        started = time.perf_counter()
        optimizer.zero_grad()
        model(batch, labels=batch, use_cache=False).loss.backward()
        optimizer.step()
        times.append(time.perf_counter() - started)
    return sorted(times)[len(times) // 2]  # a median, since the first steps are slow


def _training_arguments(folder: Path, steps: int, seed: int) -> SparseTrainingArguments:
    return SparseTrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=BATCH_SIZE,
        per_device_eval_batch_size=32, target_density=DENSITY, learning_rate=LEARNING_RATE,
        logging_steps=max(1, steps // 20), save_steps=max(1, steps // 4), save_total_limit=1,
        report_to="none", seed=seed,
    )  # fmt: skip


def _task_accuracy(task: BinaryTask) -> Callable[[CircuitGPTForCausalLM], dict[str, str]]:
    """A function that measures the model's accuracy on the task for the progress table."""
    tensors = {k: v[:128] for k, v in task.tensors("train").items()}

    def measure(model: CircuitGPTForCausalLM) -> dict[str, str]:
        with in_eval_mode(model):
            accuracy = binary_accuracy(all_pair_logits(model, tensors))
        return {"task": f"{accuracy:.0%}"}

    return measure


def _print_summary(
    folder: Path, trained: dict[str, Any], circuit: Circuit, misled: dict[str, float],
    parts: _Parts, verdict: str,
) -> None:  # fmt: skip
    rows = [
        *training_rows(trained),
        *circuit_rows(circuit),
        *((name, f"{value:.1%}") for name, value in misled.items()),
        ("minutes in all", parts.row("seconds")),
        ("  of CPU", parts.row("cpu_seconds")),
        ("model", str(folder / "model")),
        ("circuit", str(folder / "circuit")),
        ("picture", str(folder / "circuit" / "circuit.png")),
    ]
    say("\n" + table(rows))
    say("\nTask losses are on held-out prompts, in nats; guessing is 0.693.")
    say(f"\n{verdict}")
    say("\nNext:")
    say(f"  look at {folder / 'circuit' / 'circuit.png'}")
    say(f"  hf-circuit-sparsity view {folder / 'circuit'}")
    say(f"  hf-circuit-sparsity verify {folder / 'circuit'}")
    say(f"  hf-circuit-sparsity prune --model {folder / 'model'} --task while_return_true")
    say("  hf-circuit-sparsity train --output-dir runs/wider --d-model 256 --n-layer 4")
