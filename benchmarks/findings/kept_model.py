"""The circuits of the model that is kept in `models/python-1024`, with their checks.

One search per task that the model has learned, cleaned up, at the paper's target of 0.15 nats;
where the model's own loss is above that, at 1.6 times its loss. The circuits are saved beside the
results, so that they can be loaded and looked at. `--tasks` measures some of them only, so that
several processes can share the work in one folder.
"""

import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hf_circuit_sparsity.circuits.ablation import reference_means
from hf_circuit_sparsity.circuits.evaluation.verification import verify_circuit
from hf_circuit_sparsity.circuits.pruning.config import PruningConfig
from hf_circuit_sparsity.circuits.pruning.find import TaskNotLearnedError, find_circuits
from hf_circuit_sparsity.circuits.task_scores import evaluate_tasks
from hf_circuit_sparsity.commands.console import say
from hf_circuit_sparsity.modeling.modeling_circuitgpt import CircuitGPTForCausalLM
from hf_circuit_sparsity.tasks.corpus import build_corpus
from hf_circuit_sparsity.tasks.load import load_task
from hf_circuit_sparsity.tasks.packing import pack_dataset, spread_sample

from ..experiment import Experiment, machine, stored, table

MODEL = Path("models/python-1024")
TASKS = (
    "while_return_true", "single_double_quote", "indent_for", "bracket_brace", "var_if",
    "fstring_brace", "if_equals", "lambda_func", "enumerate_range",
)  # fmt: skip
SEARCH = PruningConfig(max_steps=500, batch_size=32, selection_prompts=256)
PROMPTS = 256


def run(experiment: Experiment) -> str:
    """Find and check the circuits that are not there yet; returns the report."""
    o, rows = experiment.options, []
    torch.set_num_threads(o.threads)
    config = replace(SEARCH, max_steps=o.mask_steps or SEARCH.max_steps)
    # Roughly first, so that there is one should the clean-up take too long.
    for task, cleanup in ((task, cleanup) for task in o.tasks for cleanup in (False, True)):
        folder = experiment.folder / task
        path = folder / ("cleaned_up.json" if cleanup else "rough.json")
        if path.is_file() or not (experiment.stored_only or (cleanup and o.rough)):
            find = partial(circuit_of, task, folder, o.device, replace(config, cleanup=cleanup))
            rows.append({"task": task, "cleaned up": cleanup, **stored(path, find)})
    return "\n\n".join([
        "# Circuits of the kept model",
        __doc__.strip().split("\n\n", 1)[1],
        f"Measured on: {machine(o.device)}. One seed.",
        _table(rows),
    ])  # fmt: skip


def circuit_of(task: str, folder: Path, device: str, config: PruningConfig) -> dict[str, Any]:
    """A task's circuit: its numbers, and the checks that it failed or that do not apply."""
    say(f"Looking for the circuit of {task}")
    model = CircuitGPTForCausalLM.from_pretrained(MODEL, dtype="float32", sparse=True)
    model = model.to_dense().eval().to(device) if device != "cpu" else model.eval()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    made = load_task(task, tokenizer, n_train=2 * SEARCH.selection_prompts, n_test=PROMPTS)
    (score,) = evaluate_tasks(
        model, tokenizer, [task], n_train=PROMPTS, n_test=PROMPTS, progress=False
    )
    target = max(0.15, round(1.6 * score.calibrated_loss, 3))
    started = time.perf_counter()
    try:
        (found,) = find_circuits(
            model, made, replace(config, target_loss=target), progress=False,
            reference=reference_means(model, reference(tokenizer)),
        )  # fmt: skip
    except TaskNotLearnedError as error:
        return {"problem": str(error), "accuracy": score.accuracy}
    searched = time.perf_counter()
    checks = verify_circuit(found, model, made, stability_seeds=0, progress=False).checks
    found.save_pretrained(folder / ("circuit" if config.cleanup else "rough_circuit"))
    return {
        "target": target,
        "seconds": searched - started,
        "seconds of the checks": time.perf_counter() - searched,
        "checks": {check.name: check.passed for check in checks if check.threshold is not None},
        "accuracy": score.accuracy,
        **found.metrics,
    }


def reference(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Blocks of the standard library, which is none of the packages the model was trained on."""
    blocks = pack_dataset(build_corpus(on_bad_encoding="skip")["validation"], tokenizer, 256)
    return torch.tensor(spread_sample(blocks, 256)["input_ids"])


def _table(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        line = {
            "task": row["task"],
            "model's accuracy": f"{row['accuracy']:.1%}",
            "cleaned up": "yes" if row["cleaned up"] else "no",
        }
        if "problem" in row:
            names = ("target", "nodes", "edges", "loss", "accuracy alone", "checks passed")
            lines.append({**line, **dict.fromkeys(names, ""), "not passed": row["problem"]})
            continue
        passed = [name for name, held in row["checks"].items() if held]
        failed = [name for name, held in row["checks"].items() if not held]
        lines.append({
            **line,
            "target": f"{row['target']:g}",
            "nodes": row["nodes"],
            "edges": row["edges"],
            "loss": f"{row['circuit_loss']:.3f}",
            "accuracy alone": f"{row['circuit_accuracy']:.1%}",
            "checks passed": f"{len(passed)} of {len(passed) + len(failed)}",
            "not passed": ", ".join(failed) or "none",
        })  # fmt: skip
    return table(lines)


def main() -> None:
    """The command line."""
    Experiment.main(
        run, __doc__, "kept_model", "runs/kept_model", tasks=TASKS, device="cpu", threads=2,
        mask_steps=0, rough=False,
    )  # fmt: skip


if __name__ == "__main__":
    main()
