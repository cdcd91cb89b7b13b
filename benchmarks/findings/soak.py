"""Memory, descriptors, hooks and temporary files, while tiny models are trained for thousands of
steps and a hundred circuits are found in one process: what do long runs leave behind?

Each run is a process of its own, or two. Trainings save a checkpoint and evaluate twenty times. A
circuit is found, saved, loaded, run and drawn. What is counted: the memory that the process
occupies, open file descriptors, threads, tensors that are alive, hooks of all modules and
parameters, and files in the folder for temporary ones or begun in the output folder.
"""

import gc
import os
import socket
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import TrainerCallback

from hf_circuit_sparsity.circuits.circuit import Circuit
from hf_circuit_sparsity.circuits.evaluation.faithfulness import evaluate_circuit
from hf_circuit_sparsity.circuits.pruning.config import PruningConfig
from hf_circuit_sparsity.circuits.pruning.find import find_circuit
from hf_circuit_sparsity.circuits.viewer.plot import plot_circuit
from hf_circuit_sparsity.modeling.configuration_circuitgpt import CircuitGPTConfig
from hf_circuit_sparsity.modeling.modeling_circuitgpt import CircuitGPTForCausalLM
from hf_circuit_sparsity.trainer.sparse_config import SparseTrainingArguments
from hf_circuit_sparsity.trainer.sparse_trainer import SparseTrainer

from ..experiment import Experiment, machine, mean, stored, table
from .planted.mechanisms import plant

Sample = dict[str, int]
COUNTED = {
    "memory": "memory (MB)",
    "descriptors": "descriptors",
    "threads": "threads",
    "tensors": "tensors",
    "hooks": "hooks",
    "files": "temporary files",
}
SAMPLES = 50


def sample(at: int, model: nn.Module, *folders: Path) -> Sample:
    """What the process holds now; `folders` are those in which no file may be left."""
    gc.collect()
    with open("/proc/self/statm", encoding="utf-8") as file:
        pages = int(file.read().split()[1])
    hooks = sum(
        len(value)
        for module in model.modules()
        for name, value in vars(module).items()
        if name.endswith("_hooks") and isinstance(value, dict)
    )
    for p in model.parameters():
        hooks += len(p._backward_hooks or ()) + len(p._post_accumulate_grad_hooks or ())
    temporary = [path for path in Path(tempfile.gettempdir()).rglob("*") if path.is_file()]
    begun = [path for folder in folders for path in folder.rglob(".*")]
    return {
        "at": at,
        "memory": pages * os.sysconf("SC_PAGE_SIZE") // 1000,  # kB
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "tensors": sum(type(o) in (torch.Tensor, nn.Parameter) for o in gc.get_objects()),
        "hooks": hooks,
        "files": len(temporary) + len(begun),
    }


class _Sampler(TrainerCallback):
    def __init__(self, every: int, folder: Path) -> None:
        self.every, self.folder, self.samples = every, folder, []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step % self.every == 0:
            self.samples.append(sample(state.global_step, model, self.folder))


def _own_temporary_folder(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
    torch.set_num_threads(1)


def training(
    method: str, steps: int, folder: str, environment: dict[str, str] | None = None
) -> list[Sample]:
    """Samples of one training; of its first process where there are several."""
    os.environ.update(environment or {})
    output = Path(folder) / "run"
    _own_temporary_folder(Path(folder) / f"tmp{os.environ.get('RANK', '')}")
    torch.manual_seed(0)
    config = CircuitGPTConfig(
        n_layer=1, d_model=16, d_head=8, block_size=16, vocab_size=64, enable_bigram_table=False
    )
    rows = torch.randint(64, (256, 16)).tolist()
    data = Dataset.from_dict({"input_ids": rows, "labels": rows})
    args = SparseTrainingArguments(
        output_dir=str(output), max_steps=steps, sparsifier=method, target_density=1 / 8,
        per_device_train_batch_size=2, use_cpu=True, report_to=[], disable_tqdm=True,
        logging_steps=max(1, steps // 20), save_steps=max(1, steps // 20), save_total_limit=2,
        eval_strategy="steps", eval_steps=max(1, steps // 20), log_level="error",
    )  # fmt: skip
    sampler = _Sampler(max(1, steps // SAMPLES), output)
    trainer = SparseTrainer(
        CircuitGPTForCausalLM(config), args, train_dataset=data, callbacks=[sampler],
        eval_dataset=data.select(range(8)),
    )  # fmt: skip
    trainer.train()
    return sampler.samples


def two_processes(method: str, steps: int, folder: str) -> list[Sample]:
    """As [`training`], on two processes of this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "1",
    }  # fmt: skip
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        ranks = [
            pool.submit(
                training, method, steps, folder,
                {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(2)
        ]  # fmt: skip
        return next(rank.result() for rank in ranks)


def circuits(count: int, folder: str) -> list[Sample]:
    """Samples of one process that finds so many circuits, one after the other."""
    _own_temporary_folder(Path(folder) / "tmp")
    planted = plant("and", noise=0.01)
    samples, output = [], Path(folder) / "circuit"
    for i in range(count):
        config = PruningConfig(seed=i, max_steps=40)
        circuit = find_circuit(
            planted.model, planted.task, config, reference=planted.reference, progress=False
        )
        circuit.save_pretrained(output)
        loaded = Circuit.from_pretrained(output)
        evaluate_circuit(loaded, planted.model, planted.task)
        plot_circuit(loaded, output / "plot.png", planted.model)
        if i % max(1, count // SAMPLES) == 0:
            samples.append(sample(i + 1, planted.model, output))
    return samples


def run(experiment: Experiment) -> str:
    """The table and the picture; measures what is not there yet."""
    o = experiment.options
    jobs: dict[str, tuple[Callable[..., list[Sample]], tuple]] = {
        f"top-k, {o.steps:,} steps": (_alone, (training, "topk", o.steps)),
        f"{o.circuits:,} circuits": (_alone, (circuits, o.circuits)),
        f"top-k, 2 processes, {o.steps_of_two:,} steps": (two_processes, ("topk", o.steps_of_two)),
        f"RCD, 2 processes, {o.steps_of_two:,} steps": (two_processes, ("rcd", o.steps_of_two)),
        f"RCD, {o.steps_of_rcd:,} steps": (_alone, (training, "rcd", o.steps_of_rcd)),
    }
    found: dict[str, list[Sample]] = {}
    for name, (function, arguments) in jobs.items():
        folder = experiment.folder / name.replace(",", "").replace(" ", "_")
        if experiment.stored_only and not folder.with_suffix(".json").is_file():
            continue
        found[name] = stored(
            folder.with_suffix(".json"),
            lambda f=function, a=(*arguments, str(folder)): f(*a),
        )
        print(name, found[name][0], found[name][-1], flush=True)
    picture = experiment.picture(
        lambda axes: _draw(axes, found), "Memory over the course of each run", size=(8, 4)
    )
    return "\n\n".join([
        "# What long runs leave behind",
        __doc__.strip().replace("\n", " ").replace("  ", "\n\n"),
        f"Measured on: {machine()}. Of each run the mean of the second tenth of its samples → that "
        "of the last tenth; in the first, things are loaded and caches filled.",
        table([_row(name, samples) for name, samples in found.items()]),
        picture,
    ])  # fmt: skip


def _alone(function: Callable[..., list[Sample]], *arguments: Any) -> list[Sample]:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def _row(name: str, samples: list[Sample]) -> dict[str, str]:
    tenth = max(1, len(samples) // 10)
    row = {"run": name}
    for key, title in COUNTED.items():
        digits, unit = (1, 1000) if key == "memory" else (0, 1)
        early, late = (
            mean([s[key] for s in part]) / unit
            for part in (samples[tenth : 2 * tenth], samples[-tenth:])
        )
        row[title] = f"{early:,.{digits}f} → {late:,.{digits}f}"
    return row


def _draw(axes: Any, found: dict[str, list[Sample]]) -> None:
    for name, samples in found.items():
        share = [s["at"] / samples[-1]["at"] for s in samples]
        axes.plot(share, [s["memory"] / 1000 for s in samples], label=name, linewidth=1.2)
    axes.set_xlabel("share of the run")
    axes.set_ylabel("memory of the process (MB)")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=7, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    Experiment.main(
        run,
        __doc__,
        "soak",
        "runs/soak",
        steps=20_000,
        steps_of_rcd=20_000,
        steps_of_two=2_000,
        circuits=100,
    )
