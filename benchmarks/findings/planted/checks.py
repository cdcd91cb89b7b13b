"""Which checks of `verify_circuit` see what is wrong with a circuit of which the truth is known.

Of every planted mechanism the true circuit, the true one without any one of its nodes, the true one
with twenty nodes of noise added, and the decoys alone are verified. The first should pass every
check, each other one should fail one.
"""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hf_circuit_sparsity.circuits.evaluation.verification import verify_circuit
from hf_circuit_sparsity.circuits.pruning.find import TaskNotLearnedError

from ...experiment import Experiment, grouped, machine, stored, table
from .builder import ARCHITECTURES, Nodes
from .mechanisms import MECHANISMS, Planted, plant
from .searches import NOISES

ADDED = 20
REMOVED = 2
"""One node is left out at a time, of so many that are drawn."""


def run(experiment: Experiment) -> str:
    """Verify what is not verified yet; returns the report."""
    o = experiment.options
    rows = []
    for seed in range(o.seeds):
        for noise in o.noises:
            for name in o.mechanisms:
                for architecture in o.architectures:
                    path = experiment.folder / f"checks {name} {architecture} {noise:g} {seed}.json"
                    if experiment.stored_only and not path.is_file():
                        continue
                    cell = (name, architecture, noise, seed)
                    of = {"mechanism": name, "architecture": architecture, "noise": noise}
                    found = stored(path, lambda cell=cell: verified(plant(*cell), cell[-1]))
                    rows += [{**row, **of} for row in found]
    return report(rows)


def variants(planted: Planted, seed: int) -> Iterator[tuple[str, Nodes]]:
    """The circuits that are verified, by name."""
    truth = planted.truth
    draw = random.Random(f"{planted.name} {seed}")
    true = truth.sufficient()
    yield "true", true
    for node in draw.sample(sorted(true), REMOVED):
        yield "one node missing", true - {node}
    rest = [
        (site, i)
        for site, mean in sorted(planted.means.nodes.items())
        for i in range(len(mean))
        if (site, i) not in truth.nodes | truth.decoys
    ]
    yield f"{ADDED} nodes added", true | frozenset(draw.sample(rest, ADDED))
    if truth.decoys and planted.name != "cancelling parts":
        yield "decoys alone", truth.decoys


def verified(planted: Planted, seed: int) -> list[dict[str, Any]]:
    """Of every variant the checks that failed, and whether the task can be asked at all."""
    rows = []
    for name, nodes in variants(planted, seed):
        try:
            checks = verify_circuit(
                planted.circuit(nodes), planted.model, planted.task, prompts=96, random_circuits=8,
                subsets=3, supersets=4, adversary_steps=8, others=[], adversarial={},
                progress=False,
            )  # fmt: skip
        except TaskNotLearnedError:  # the noise drowns the mechanism
            return []
        failed = [check.name for check in checks.checks if not check.passed]
        values = {c.name: c.value for c in checks.checks if c.threshold is not None}
        rows.append({"variant": name, "failed": failed, "values": values})
    return rows


def report(rows: Sequence[dict[str, Any]]) -> str:
    """The tables, of rows with the keys of [`verified`] and what they were measured on."""
    return "\n\n".join([
        "# What the checks see", *__doc__.strip().split("\n\n"), EXPLANATION,
        f"Measured on: {machine()}.", _table(rows, "variant", "noise"),
        "The true circuits by mechanism:",
        _table([row for row in rows if row["variant"] == "true"], "mechanism"),
    ])  # fmt: skip


EXPLANATION = """\
Mechanisms, noise and architectures as in [planted.md](planted.md); 96 held-out prompts, eight
random circuits, no search from other seeds. Where noise drowns the mechanism and the model does
not solve its task, nothing is verified. "failed by" counts runs in which a check failed."""


def _table(rows: Sequence[dict[str, Any]], *keys: str) -> str:
    lines = []
    ordered = sorted(rows, key=lambda row: [str(row[key]) for key in keys])
    for group, members in grouped(ordered, *keys).items():
        runs = [row["failed"] for row in members]
        counted = Counter(name for failed in runs for name in failed)
        lines.append({
            **dict(zip(keys, group, strict=True)), "runs": len(runs),
            "pass all": f"{sum(not failed for failed in runs) / len(runs):.0%}",
            "failed by": ", ".join(f"{name} {n}" for name, n in counted.most_common()) or "none",
        })  # fmt: skip
    return table(lines)


def main() -> None:
    """The command line."""
    Experiment.main(
        run, __doc__, "planted_checks", str(Path("runs") / "planted"), mechanisms=tuple(MECHANISMS),
        architectures=tuple(ARCHITECTURES), noises=NOISES, seeds=2,
    )  # fmt: skip


if __name__ == "__main__":
    main()
