"""A search over settings of random coordinate descent, and of top-k beside it, on a small model.

Reads runs from standard input, one per line, as `rcd steps=1200 lr=0.01 selection=gradient
block_fraction=1/4` or `topk lr=0.02`: the method, then steps, batch, lr, and settings of the
optimizer. A run that is stored already is not repeated.
"""

import re
import sys
from fractions import Fraction
from typing import Any

from hf_circuit_sparsity.modeling.configuration_circuitgpt import CircuitGPTConfig

from ..experiment import Experiment, machine, stored, table
from .rcd_race import Run, Training, builders, spread, tokens

CONTEXT = 128


def parse(line: str) -> Run:
    """A run from its line.

    Raises:
        ValueError: the line does not begin with a method, or a part is not `name=value`.
    """
    method, *parts = line.split()
    if method not in ("topk", "rcd"):
        raise ValueError(f"the line {line!r} does not begin with topk or rcd: name the method.")
    settings: dict[str, Any] = {}
    for part in parts:
        name, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"{part!r} in {line!r} is not name=value: write for example lr=0.01.")
        settings[name] = _value(value)
    return Run(
        method,
        settings.pop("steps", 300),
        settings.pop("lr", 1e-2),
        settings.pop("batch", 4),
        settings,
    )


def _value(text: str) -> int | float | str:
    for kind in (int, float, lambda t: float(Fraction(t))):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def run(experiment: Experiment) -> str:
    """Train every run of standard input; the table, best last within the runs of equal length."""
    o = experiment.options
    data = tokens(experiment.folder, o.vocabulary, CONTEXT)
    held_out = spread(data["validation"], 96)
    config = CircuitGPTConfig(
        n_layer=o.layers, d_model=o.d_model, d_head=16, block_size=CONTEXT, vocab_size=o.vocabulary
    )
    build, build_sparse = builders(config, data["train"] if o.start_at_bigrams else None)

    def measure(plan: Run) -> dict[str, Any]:
        training = Training(
            build, plan, 1 / o.inverse_density, data["train"], held_out, build_sparse
        )
        while not training.finished:
            training.run(max(1, plan.steps // 4))
            training.evaluate()
        training.close()
        losses = [point["loss"] for point in training.curve]
        return {"losses": losses, "cpu_ms": 1e3 * training.cpu_seconds / plan.steps}

    results = []
    for line in filter(None, map(str.strip, sys.stdin)):
        plan = parse(line)
        file = experiment.folder / "measured" / f"{re.sub(r'[^A-Za-z0-9=._]+', '-', line)}.json"
        results.append((line, plan, stored(file, lambda plan=plan: measure(plan))))
    rows = [
        {
            "run": line,
            "steps": plan.steps,
            "validation loss at half": f"{found['losses'][1]:.3f}",
            "at the end": f"{found['losses'][-1]:.3f}",
            "CPU ms per step": f"{found['cpu_ms']:.0f}",
        }
        for line, plan, found in sorted(results, key=lambda r: (r[1].steps, -r[2]["losses"][-1]))
    ]
    return (
        f"# Settings tried\n\n{machine()}\n\nCircuitGPT, d_model {o.d_model}, {o.layers} layers, "
        f"vocabulary {o.vocabulary}, context {CONTEXT}, density 1/{o.inverse_density} at the end; "
        "96 validation sequences; one seed."
        + (" All begin with the bigram counts." if o.start_at_bigrams else "")
        + f"\n\n{table(rows)}"
    )


if __name__ == "__main__":
    Experiment.main(
        run, __doc__, "rcd_search", "runs/rcd_search", d_model=192, layers=2, vocabulary=512,
        inverse_density=24, start_at_bigrams=False,
    )  # fmt: skip
