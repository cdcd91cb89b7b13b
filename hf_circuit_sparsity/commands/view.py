"""`hf-circuit-sparsity view`: write the page of a circuit."""

from pathlib import Path

from ..circuits.viewer.report import write_report
from ..circuits.viewer.report_data import ReportConfig
from ..files import check_can_write
from ..modeling.modeling_circuitgpt import CircuitGPTForCausalLM
from .console import on_terminal, quiet_libraries, say, table
from .loading import circuit_at, load_circuit


def run_view(
    name: str,
    model: str | None = None,
    output_dir: str | None = None,
    corpus: str | None = None,
    config: ReportConfig | None = None,
) -> Path:
    """Measure what a saved circuit does and write its page, `index.html`.

    Beside it goes `circuit.py`, which the page links: a circuit of a CircuitGPT as a program.

    Args:
        name: folder or Hub id of the circuit.
        model: folder or Hub id of the model it was cut out of, with its tokenizer; what the circuit
            says itself if not given.
        output_dir: of the page; if not given the circuit's folder, or this one for a circuit from
            the Hub.
        corpus: folder of Python files for examples; the standard library if not given.
        config: how much to measure.
    """
    quiet_libraries()
    name = circuit_at(name)
    folder = Path(output_dir or (name if Path(name).is_dir() else "."))
    check_can_write(folder)
    circuit, loaded, tokenizer, reference = load_circuit(name, model, corpus)
    config = config or ReportConfig()
    longest = loaded.config.max_position_embeddings
    task = circuit.load_task(tokenizer, seed=config.seed, max_length=longest)
    path = folder / "index.html"
    program = folder / "circuit.py" if isinstance(loaded, CircuitGPTForCausalLM) else None
    write_report(
        circuit, path, loaded, tokenizer, task=task, reference=reference, config=config,
        program=program and program.name, progress=on_terminal(),
    )  # fmt: skip
    rows = [("page", path), ("size", f"{path.stat().st_size / 1000:,.0f} kB")]
    if program is not None:
        circuit.to_program(program, loaded, tokenizer=tokenizer, task=task)
        rows.append(("program", program))
    say("\n" + table(rows))
    say("\nOpen it in a browser. It needs no network and no server, and is a static Space already.")
    return path
