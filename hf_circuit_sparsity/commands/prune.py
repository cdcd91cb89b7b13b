"""`hf-circuit-sparsity prune`: cut a task's circuit out of a trained model."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..circuits.circuit import Circuit
from ..circuits.circuit_file import is_hub_id
from ..circuits.evaluation.verification import verify_circuit
from ..circuits.pruning.config import PruningConfig
from ..circuits.pruning.find import find_circuit
from ..circuits.pruning.tune import search_circuit
from ..circuits.viewer.plot import plot_circuit
from ..hub.errors import HubAccessError, hub_errors
from ..modeling.modeling_circuitgpt import CircuitGPTForCausalLM
from ..tasks.binary_task import BinaryTask
from ..tasks.corpus import build_corpus
from ..tasks.load import load_task
from ..tasks.packing import pack_dataset
from .console import quiet_libraries, say, table


def run_prune(
    model: str,
    task: str,
    output_dir: str | None,
    config: PruningConfig,
    corpus: str | None = None,
    trials: int = 1,
    verify: bool = False,
) -> Circuit:
    """Find, save and draw the circuit of a task in a saved model.

    Args:
        model: folder or Hub id of a CircuitGPT with its tokenizer.
        task: one of `list_tasks()`.
        output_dir: where the circuit goes; `<model>/circuits/<task>` if not given.
        config: how to look for it.
        corpus: folder of Python over which nodes' means are taken; the standard library if not
            given.
        trials: settings of mask learning to try; above 1 they are searched, with the state of the
            search in `<output_dir>/search`.
        verify: also run the checks of `verify_circuit`, print and store them.
    """
    quiet_libraries()
    loaded, tokenizer = load_model(model)
    reference = None
    if corpus is not None:
        reference = pack_dataset(build_corpus(corpus)["train"], tokenizer, loaded.config.block_size)
    folder = Path(output_dir) if output_dir else Path(model) / "circuits" / task
    circuit = prune_model(loaded, tokenizer, task, folder, config, reference, trials)
    if verify:
        task_loaded = _load_task(task, loaded, tokenizer, config)
        verification = verify_circuit(circuit, loaded, task_loaded, reference=reference)
        circuit.save_pretrained(folder)
        say(verification.table())
    return circuit


def _load_task(
    name: str,
    model: CircuitGPTForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    config: PruningConfig,
) -> BinaryTask:
    return load_task(
        name, tokenizer, seed=config.seed, max_length=model.config.max_position_embeddings
    )


def load_model(model: str) -> tuple[CircuitGPTForCausalLM, PreTrainedTokenizerBase]:
    """A saved model and its tokenizer.

    Raises:
        ValueError: it is damaged, or no folder with both.
        HubAccessError: (an `OSError`) it is not on the Hub, or cannot be had from there.
    """
    try:
        with hub_errors(model) if is_hub_id(model) else nullcontext():
            loaded = CircuitGPTForCausalLM.from_pretrained(model).eval()
            return loaded, _tokenizer_beside(model)
    except HubAccessError:
        raise
    except SafetensorError as error:
        raise ValueError(
            f"The weights in {model} are damaged ({error}); copy or download them again."
        ) from error
    except OSError as error:
        raise ValueError(
            f"{model!r} is neither a folder with a model and its tokenizer nor the name of a "
            "repository with both; check its name."
        ) from error


def _tokenizer_beside(model: str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(model)
    except ValueError as error:
        raise ValueError(
            f"{model!r} holds a model, but no tokenizer beside it that could be read; save the "
            "tokenizer there too."
        ) from error


def prune_model(
    model: CircuitGPTForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    task_name: str,
    folder: Path,
    config: PruningConfig,
    reference: Any = None,
    trials: int = 1,
) -> Circuit:
    """Find the circuit of a task, then write it and its picture into `folder`."""
    task = _load_task(task_name, model, tokenizer, config)
    if trials > 1:
        circuit = search_circuit(
            model,
            task,
            config,
            trials=trials,
            folder=folder / "search",
            reference=reference,
        )
    else:
        circuit = find_circuit(model, task, config, reference=reference)
    circuit.save_pretrained(folder)
    plot_circuit(circuit, folder / "circuit.png", model, tokenizer)
    return circuit


def circuit_rows(circuit: Circuit) -> list[tuple[str, str]]:
    """The summary table's rows about a circuit."""
    m = circuit.metrics
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
        ("  its logits calibrated", f"{m['calibrated_model_loss']:.3f}"),
        ("loss, circuit alone", f"{m['circuit_loss']:.3f}, accuracy {m['circuit_accuracy']:.1%}"),
        ("loss, circuit removed", f"{m['ablated_loss']:.3f}, accuracy {m['ablated_accuracy']:.1%}"),
    ]


def print_prune_summary(circuit: Circuit, folder: Path) -> None:
    """What `hf-circuit-sparsity prune` prints at its end."""
    say(
        "\n"
        + table(
            [
                *circuit_rows(circuit),
                ("files", str(folder)),
                ("picture", str(folder / "circuit.png")),
            ]
        )
    )
    say("\nLosses are on held-out prompts, in nats; guessing is 0.693.")
    say(f"Next: hf-circuit-sparsity view {folder}")
