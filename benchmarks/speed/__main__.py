"""Every claim of speed in the README, measured on this machine and written into one report.

`--quick` takes small sizes, in seconds, to see that all runs; its figures mean little.
"""

import time

from ..experiment import Experiment
from . import (
    abs_topk,
    circuits,
    memory,
    projection,
    sparse_checkpoint,
    sparse_execution,
    training_step,
    width,
)  # fmt: skip
from .timing import main

SECTIONS = {
    "Exact top-k projection": projection,
    "AbsTopK": abs_topk,
    "Sparse execution": sparse_execution,
    "Time against width": width,
    "Training step": training_step,
    "Sparse checkpoints": sparse_checkpoint,
    "Circuits": circuits,
    "Memory": memory,
}


def run(experiment: Experiment) -> str:
    """Run every benchmark, one after the other; returns the sections of the report."""
    parts = []
    if experiment.options.quick:
        parts.append("Small sizes (`--quick`): these figures only show that everything runs.")
    for title, module in SECTIONS.items():
        print(f"{title} ...", flush=True)
        start = time.perf_counter()
        text = module.run(experiment)
        took = time.perf_counter() - start
        parts += [f"## {title}", f"{module.__doc__} ({took:.0f} s)", text]
    return "\n\n".join(parts)


if __name__ == "__main__":
    main(run, __doc__, "speed")
