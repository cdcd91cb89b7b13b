"""`hf-circuit-sparsity prune`: cut a task's circuit out of a trained model."""

from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedModel

from ..circuits.circuit import Circuit
from ..circuits.pruning.config import PruningConfig
from ..circuits.pruning.find import find_circuit
from ..circuits.pruning.tune import search_circuit
from ..circuits.viewer.plot import plot_circuit
from ..files import check_can_write
from ..tasks.binary_task import BinaryTask
from ..tasks.load import check_tasks, load_task
from .console import check_can_draw, on_terminal, quiet_libraries, say, table
from .loading import load_model, reference_blocks


@dataclass
class PruneArguments:
    """What is pruned, and where the circuit goes."""

    model: str
    """Folder or Hub id of a model with its tokenizer."""
    task: str
    """Built-in task, CSV file, folder, or user/tasks:name on the Hub."""
    output_dir: str | None = None
    """Of the circuit; MODEL/circuits/TASK if not given."""
    corpus: str | None = None
    """Folder of Python files over which nodes' means are taken; the standard library if not
    given."""
    trials: int = 1
    """Settings of mask learning to try for the smallest circuit; the same command goes on after
    Ctrl-C. 1 is no search."""


def run_prune(arguments: PruneArguments, config: PruningConfig) -> Circuit:
    """Find, save and draw the circuit of a task in a saved model.

    With more than one trial the state of the search is in `<output_dir>/search`.

    Raises:
        TaskNotLearnedError: (a `ValueError`) the model does not reach the target loss.
        ValueError, OSError: no such model or task, or a bad corpus.
    """
    quiet_libraries()
    check_can_draw()
    check_tasks([arguments.task])
    check_can_write(arguments.output_dir or arguments.model)
    model, tokenizer = load_model(arguments.model)
    longest = model.config.max_position_embeddings
    task = load_task(arguments.task, tokenizer, seed=config.seed, max_length=longest)
    reference = reference_blocks(arguments.corpus, model, tokenizer)
    default = Path(model.name_or_path) / "circuits" / task.name
    folder = Path(arguments.output_dir or default)
    circuit = prune_model(model, task, folder, config, reference, arguments.trials)
    rows = [*circuit_rows(circuit), ("files", folder), ("picture", folder / "circuit.png")]
    say("\n" + table(rows))
    say("\nLosses are on held-out prompts, in nats; guessing is 0.693.")
    say(f"Next: hf-circuit-sparsity verify {folder}")
    say(f"      hf-circuit-sparsity view {folder}")
    return circuit


def prune_model(
    model: PreTrainedModel,
    task: BinaryTask,
    folder: Path,
    config: PruningConfig,
    reference: Dataset | None = None,
    trials: int = 1,
) -> Circuit:
    """Find the circuit of a task, then write it and its picture into `folder`."""
    shown = {"reference": reference, "progress": on_terminal()}
    if trials > 1:
        circuit = search_circuit(
            model, task, config, trials=trials, folder=folder / "search", **shown
        )
    else:
        circuit = find_circuit(model, task, config, **shown)
    circuit.save_pretrained(folder)
    plot_circuit(circuit, folder / "circuit.png", model, task.tokenizer)
    return circuit


def circuit_rows(circuit: Circuit) -> list[tuple[str, str]]:
    """The summary table's rows about a circuit."""
    m, calibration = circuit.metrics, circuit.calibration
    shift = max(calibration.shift.values(), default=0.0)
    calibrated = f"scale {calibration.scale:.2f}, shift ±{shift:.2f}; the circuit's as well"
    extra = []
    if circuit.tokens is not None:
        extra.append(("its tokens", f"{m['token_nodes']}, {m['token_edges']} edges from them"))
    if "seed_jaccard" in m:
        extra.append(("nodes that two seeds share", f"{m['seed_jaccard']:.0%} on average"))
    return [
        ("task", circuit.task),
        ("circuit", f"{m['nodes']} nodes, {m['edges']} edges"),
        *extra,
        ("its share", f"{m['node_share']:.2%} of the nodes, {m['edge_share']:.3%} of the edges"),
        ("loss, whole model", f"{m['model_loss']:.3f}, accuracy {m['model_accuracy']:.1%}"),
        ("  its logits calibrated", f"{m['calibrated_model_loss']:.3f}, {calibrated}"),
        ("loss, circuit alone", f"{m['circuit_loss']:.3f}, accuracy {m['circuit_accuracy']:.1%}"),
        ("  its logits uncalibrated", f"{m['uncalibrated_circuit_loss']:.3f}"),
        ("loss, circuit removed", f"{m['ablated_loss']:.3f}, accuracy {m['ablated_accuracy']:.1%}"),
    ]
