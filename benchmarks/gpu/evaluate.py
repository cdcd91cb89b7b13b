"""What the trained model has learned: the twenty tasks, or the circuit of one of them."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hf_circuit_sparsity.circuits.ablation import reference_means
from hf_circuit_sparsity.circuits.pruning.config import PruningConfig
from hf_circuit_sparsity.circuits.pruning.find import TaskNotLearnedError, find_circuits
from hf_circuit_sparsity.circuits.task_scores import evaluate_tasks
from hf_circuit_sparsity.commands.console import quiet_libraries
from hf_circuit_sparsity.files import write_json
from hf_circuit_sparsity.modeling.modeling_circuitgpt import CircuitGPTForCausalLM
from hf_circuit_sparsity.tasks.load import load_task

from ..experiment import table
from .sizes import SIZES, TokenBlocks, stage_arguments, write_section


def main() -> None:
    parser = stage_arguments(__doc__)
    parser.add_argument("--circuit", type=int, help="of the n-th best learned task, from 0")
    args = parser.parse_args()
    quiet_libraries()
    model = CircuitGPTForCausalLM.from_pretrained(args.work / "model").eval().to(args.device)
    tokenizer = AutoTokenizer.from_pretrained(args.work / "model")
    if args.circuit is None:
        measure_tasks(args, model, tokenizer)
    else:
        cut_circuit(args, model, tokenizer)


def measure_tasks(
    args: Any, model: CircuitGPTForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Accuracy and loss on held-out templates; the best learned tasks come first in the file."""
    n = SIZES[args.size].task_prompts
    rows = task_scores(model, tokenizer, n)
    write_json(args.work / "tasks.json", rows)
    write_section(args.work, "3-tasks", f"## Tasks\n\n{tasks_told(rows, n)}")


def task_scores(
    model: CircuitGPTForCausalLM, tokenizer: PreTrainedTokenizerBase, prompts: int
) -> list[dict[str, Any]]:
    """Accuracy and losses of every task, each a `TaskScore` as a dict; the best learned first."""
    scores = evaluate_tasks(model, tokenizer, n_train=prompts, n_test=prompts, progress=False)
    scores.sort(key=lambda s: (s.calibrated_loss is None, s.calibrated_loss))
    return [vars(score) for score in scores]


def tasks_told(rows: Sequence[Mapping[str, Any]], prompts: int) -> str:
    """What [`task_scores`] found, as a sentence and a table."""
    lines = [
        {
            "task": row["task"],
            "accuracy": "" if row["accuracy"] is None else f"{row['accuracy']:.1%}",
            "loss": "" if row["loss"] is None else f"{row['loss']:.3f}",
            "calibrated": row["problem"] or f"{row['calibrated_loss']:.3f}",
        }
        for row in rows
    ]
    learned = sum((row["accuracy"] or 0) >= 0.9 for row in rows)
    return (
        f"{prompts} prompts of held-out templates each; losses on the two candidates, in nats, "
        f"guessing is 0.693. Accuracy is 90 % or more on {learned}.\n\n{table(lines)}"
    )


def cut_circuit(
    args: Any, model: CircuitGPTForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Find the circuit twice: roughly, so that there is one, then with the clean-up."""
    size = SIZES[args.size]
    score = json.loads((args.work / "tasks.json").read_text())[args.circuit]
    blocks = TokenBlocks(args.data / "train.bin", size.block_size)
    means = reference_means(model, blocks.spread(256))
    task = load_task(score["task"], tokenizer, n_train=max(64, 2 * size.task_prompts),
                     n_test=size.task_prompts, max_length=size.block_size)  # fmt: skip
    # The paper's target, or what the model itself reaches with some room.
    target = max(0.15, 1.6 * score["calibrated_loss"])
    for cleanup in (False, True):
        started = time.perf_counter()
        config = PruningConfig(
            target_loss=target,
            max_steps=size.mask_steps,
            selection_prompts=size.task_prompts,
            cleanup=cleanup,
        )
        try:
            (circuit,) = find_circuits(model, task, config, reference=means, progress=False)
        except TaskNotLearnedError as error:  # as by a small model, to rehearse
            write_section(args.work, f"4-circuit-{args.circuit}", f"{task.name}: {error}")
            return
        circuit.save_pretrained(args.work / "circuits" / task.name)
        report(args.work, args.circuit, circuit, target, time.perf_counter() - started)


def report(work: Path, number: int, circuit: Any, target: float, seconds: float) -> None:
    """Write the circuit's line, under a heading if it is the first."""
    m = circuit.metrics
    row = {
        "circuit": circuit.task,
        "target loss": f"{target:.3f}",
        "nodes": m["nodes"],
        "edges": m["edges"],
        "held-out loss": f"{m['circuit_loss']:.3f}",
        "accuracy": f"{m['circuit_accuracy']:.1%}",
        "model's loss": f"{m['calibrated_model_loss']:.3f}",
        "loss without it": f"{m['ablated_loss']:.3f}",
        "seconds": round(seconds, 1),
        "cleaned up": circuit.config["cleanup"],
    }
    write_json(work / f"circuit-{number}.json", {**row, **m})
    write_section(work, f"4-circuit-{number}", f"## Circuit {number + 1}\n\n{table([row])}")


if __name__ == "__main__":
    main()
