"""`hf-circuit-sparsity view`: write the page of a circuit."""

from pathlib import Path

from ..circuits.circuit import Circuit
from ..circuits.viewer.report import write_report
from ..circuits.viewer.settings import ReportConfig
from ..tasks.corpus import build_corpus
from ..tasks.packing import pack_dataset
from .console import quiet_libraries, say, table
from .prune import load_model


def run_view(
    circuit_folder: str,
    model: str | None = None,
    output: str | None = None,
    corpus: str | None = None,
    config: ReportConfig | None = None,
) -> Path:
    """Measure what a saved circuit does and write its page.

    Args:
        circuit_folder: folder or Hub id of the circuit.
        model: folder or Hub id of the model it was cut out of, with its tokenizer; found by the
            circuit's own account if not given.
        output: the page; if not given, `index.html` in the circuit's folder, or here for one from
            the Hub.
        corpus: folder of Python for examples; the standard library if not given.
        config: how much to measure.
    """
    quiet_libraries()
    circuit = Circuit.from_pretrained(circuit_folder)
    loaded, tokenizer = load_model(model or model_of(circuit, Path(circuit_folder)))
    circuit.check_model(loaded)  # before the corpus is read
    reference = None
    if corpus is not None:
        reference = pack_dataset(build_corpus(corpus)["train"], tokenizer, loaded.config.block_size)
    folder = Path(circuit_folder) if Path(circuit_folder).is_dir() else Path()
    path = Path(output) if output else folder / "index.html"
    return write_report(circuit, path, loaded, tokenizer, reference=reference, config=config)


def model_of(circuit: Circuit, folder: Path) -> str:
    """Where a circuit's model is: where it says, or beside it as our commands lay them out."""
    beside = [folder.parent / "model", folder.parent.parent]
    for place in (Path(circuit.model_name or folder), *beside):
        if (place / "config.json").is_file():
            return str(place)
    if not circuit.model_name:
        raise ValueError(
            f"The circuit in {folder} does not say which model it is of; pass --model."
        )
    return circuit.model_name


def print_view_summary(path: Path) -> None:
    """What `hf-circuit-sparsity view` prints at its end."""
    rows = [("page", path), ("size", f"{path.stat().st_size / 1000:,.0f} kB")]
    say("\n" + table(rows))
    say("\nOpen it in a browser. It needs no network and no server, and as index.html it is a")
    say("static Space.")
