"""Every claim of speed in the README, measured on this machine and written into one report.

All of it once for every number of `--threads`: by default for one, and for as many as torch would
take. `--quick` takes small sizes, in seconds, to see that all runs; its figures mean little.
"""

import time

import torch

from ..experiment import Experiment
from . import (
    abs_topk,
    circuits,
    growth,
    memory,
    projection,
    sparse_checkpoint,
    sparse_execution,
    training_step,
)  # fmt: skip
from .timing import main

SECTIONS = {
    "Exact top-k projection": projection,
    "AbsTopK": abs_topk,
    "Sparse execution": sparse_execution,
    "Growth": growth,
    "Training step": training_step,
    "Sparse checkpoints": sparse_checkpoint,
    "Circuits": circuits,
    "Memory": memory,
}


def run(experiment: Experiment) -> str:
    """Run every benchmark, one after the other; returns the sections of the report."""
    parts, before = [], torch.get_num_threads()
    if experiment.options.quick:
        parts.append("Small sizes (`--quick`): these figures only show that everything runs.")
    counts = experiment.options.threads or sorted({1, before})
    try:
        for count in counts:
            torch.set_num_threads(count)
            named = f"{experiment.name}_threads_{count}"  # of the pictures
            one = Experiment(
                named, experiment.folder, experiment.results, **vars(experiment.options)
            )
            parts += [f"# {count} thread(s)", *_sections(one)]
    finally:
        torch.set_num_threads(before)
    return "\n\n".join(parts)


def _sections(experiment: Experiment) -> list[str]:
    parts = []
    for title, module in SECTIONS.items():
        print(f"{title} ...", flush=True)
        start = time.perf_counter()
        text = module.run(experiment)
        took = time.perf_counter() - start
        parts += [f"## {title}", f"{module.__doc__} ({took:.0f} s)", text]
    return parts


if __name__ == "__main__":
    main(run, __doc__, "speed", threads=())
