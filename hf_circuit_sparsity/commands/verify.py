"""`hf-circuit-sparsity verify`: check a circuit beside random ones of its size."""

from pathlib import Path

from ..circuits.evaluation.checks import Verification
from ..circuits.evaluation.verification import verify_circuit
from ..files import check_can_write
from .console import on_terminal, quiet_libraries, say
from .loading import circuit_at, load_circuit


def run_verify(
    name: str,
    model: str | None = None,
    output_dir: str | None = None,
    corpus: str | None = None,
    stability_seeds: int = 2,
) -> Verification:
    """Check a saved circuit, print the checks and keep them with it.

    Args:
        name: folder or Hub id of the circuit.
        model: folder or Hub id of the model it was cut out of, with its tokenizer; what the circuit
            says itself if not given.
        output_dir: where the circuit is saved with its checks; if not given its own folder. Those
            of a circuit from the Hub are then only printed.
        corpus: folder of Python files over which the means of circuits from other seeds are taken;
            the standard library if not given.
        stability_seeds: circuits to find from other seeds, as many on other prompts and wordings;
            0 for none, and for no search on a nonsense task and shuffled weights.

    Raises:
        TaskNotLearnedError: (a `ValueError`) the model does not solve the task.
        ValueError, OSError: no such circuit or model, or a circuit of another one.
    """
    quiet_libraries()
    name = circuit_at(name)
    if output_dir or Path(name).is_dir():
        check_can_write(output_dir or name)
    circuit, loaded, tokenizer, reference = load_circuit(name, model, corpus)
    longest = loaded.config.max_position_embeddings
    task = circuit.load_task(tokenizer, max_length=longest)
    verification = verify_circuit(
        circuit, loaded, task, stability_seeds=stability_seeds, reference=reference,
        progress=on_terminal(),
    )  # fmt: skip
    say(f"{verification.table()}\n\n{verification.verdict()}")
    if output_dir or Path(name).is_dir():
        circuit.save_pretrained(output_dir or name)
        say(f"\nKept in {Path(output_dir or name) / 'circuit.json'}")
    return verification
