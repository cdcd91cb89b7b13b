"""Random coordinate descent beside other ways to train a sparse model, and its settings one by one.

Every side gets the learning rate that is best for it: of rates a factor of two apart the search
goes on until the best one lies between two worse ones, on the first seed. All take as many steps,
on the same data, and end with as many nonzeros. What is stored already is not repeated.
"""

import math
from collections.abc import Callable
from typing import Any

import torch

from hf_circuit_sparsity.commands.console import say
from hf_circuit_sparsity.modeling.configuration_circuitgpt import CircuitGPTConfig
from hf_circuit_sparsity.optim.rcd.optimizer import RCDSparseOptimizer

from ..experiment import Experiment, machine, mean, spread, stored, table
from .rcd_race import Run, Training, bigram_loss, builders, tokens
from .rcd_race import spread as spread_rows

CONTEXT = 128
HELD_OUT = 128
# Rates are so many powers of two times this one.
UNIT = 1e-3
FARTHEST = 5
GREEDY = {"selection": "gradient", "greedy_fraction": 1 / 4}
ALL_AT_ONCE = {
    "block_fraction": 1.0,
    "rest_steps": 19,
    "replace_fraction": 0.3,
    "explore_end": 0.75,
}
REPLACING = {
    "selection": "gradient", "replace_fraction": 0.02, "grace_steps": 20, "explore_end": 0.75,
}  # fmt: skip

SIDES: dict[str, tuple[str, dict[str, Any]]] = {
    "top-k": ("topk", {}),
    "top-k, annealed in a quarter": ("topk", {"anneal_end": 0.25}),
    "GMP": ("gmp", {}),
    "AC/DC": ("acdc", {}),
    "straight-through top-k": ("ste", {}),
    "frozen": ("rcd", {"explore_end": 0.0}),
    "SET": ("rcd", {**ALL_AT_ONCE, "selection": "uniform"}),
    "RigL": ("rcd", {**ALL_AT_ONCE, "selection": "gradient"}),
    "RCD, outgrowing": ("rcd", GREEDY),
    "RCD, replacing": ("rcd", REPLACING),
    "RCD, replacing, no grace": ("rcd", {**REPLACING, "grace_steps": 0}),
    "RCD, replacing 1/200": ("rcd", {**REPLACING, "replace_fraction": 0.005}),
    "RCD, replacing 1/20": ("rcd", {**REPLACING, "replace_fraction": 0.05}),
    "RCD, replacing at random": ("rcd", {**REPLACING, "selection": "uniform"}),
    "RCD, replacing, blocks of 1/4": ("rcd", {**REPLACING, "block_fraction": 1 / 4}),
    "RCD, replacing, from five times": ("rcd", {**REPLACING, "start_density": 5.0}),
    "RCD, outgrowing, from five times": ("rcd", {**GREEDY, "start_density": 5.0}),
    "RCD, outgrowing, from ten times": ("rcd", {**GREEDY, "start_density": 10.0}),
    "RCD, outgrowing, blocks of 1/4": ("rcd", {**GREEDY, "block_fraction": 1 / 4}),
    "RCD, outgrowing, stays of 4": ("rcd", {**GREEDY, "block_steps": 4}),
    "RCD, outgrowing, grace": ("rcd", {**GREEDY, "grace_steps": 20}),
    "RCD, outgrowing, explores 1/2": ("rcd", {**GREEDY, "explore_end": 0.5}),
}
"""How each is trained; a `start_density` is in units of the density at the end."""
SECOND_PLACE = ("frozen", "top-k")
"""The sides that all are compared with."""


def run(experiment: Experiment) -> str:
    """Train what is not there yet; returns the report."""
    o = experiment.options
    data = tokens(experiment.folder, o.vocabulary, CONTEXT)
    held_out = spread_rows(data["validation"], HELD_OUT)
    config = CircuitGPTConfig(
        n_layer=o.layers, d_model=o.d_model, d_head=16, block_size=CONTEXT, vocab_size=o.vocabulary
    )

    def trained(side: str, exponent: int, seed: int) -> dict[str, Any] | None:
        """Loss and cost of one training; None where it is not stored and nothing is measured."""
        method, settings = SIDES[side]
        if start := settings.get("start_density"):
            settings = {**settings, "start_density": min(1.0, start / o.inverse_density)}
        name = side.replace("/", "-").replace(" ", "-").replace(",", "")
        size = f"{o.d_model}-{o.layers}-{o.vocabulary}-{o.inverse_density}-{o.steps}x{o.batch}"
        path = experiment.folder / "measured" / size / f"{name} {exponent} {seed}.json"
        if experiment.stored_only and not path.is_file():
            return None
        plan = Run(method, o.steps, UNIT * 2.0**exponent, o.batch, settings, seed)

        def measure() -> dict[str, Any]:
            build, build_sparse = builders(config, data["train"], seed)
            training = Training(
                build, plan, 1 / o.inverse_density, data["train"], held_out, build_sparse
            )
            births = Births(training.optimizer)
            training.run(plan.steps)
            loss = training.evaluate()
            training.close()
            found = {
                "loss": loss if math.isfinite(loss) else 1e9, "nonzeros": training.nonzeros()[0],
                "cpu_ms": 1e3 * training.cpu_seconds / plan.steps, **births.shares(),
            }  # fmt: skip
            say(f"{side}, rate {plan.lr:g}, seed {seed}: {loss:.4f}, {found['cpu_ms']:.0f} ms")
            return found

        return stored(path, measure)

    rows, base = {}, bigram_loss(data["train"], held_out, o.vocabulary)[0]
    for side in o.sides:
        best, tried = best_exponent(lambda e, side=side: trained(side, e, 0))
        if not {e for e in (best - 1, best, best + 1) if abs(e) <= FARTHEST} <= tried.keys():
            continue  # the search for its rate was stopped
        found = [trained(side, best, seed) for seed in range(o.seeds)]
        found = [of for of in found if of]
        if found:
            rows[side] = {"rate": UNIT * 2.0**best, "tried": tried, "found": found}
    return report(rows, base, o)


class Births:
    """How many coordinates grow in a training by random coordinate descent, and how many stay."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.counted, self.steps = optimizer, 0, 0
        if isinstance(optimizer, RCDSparseOptimizer):
            optimizer.register_step_post_hook(self._count)

    def _ages(self) -> list[torch.Tensor]:
        own = [self.optimizer.state[p] for _, p in self.optimizer.sparse_parameters()]
        return [state.moments["age"] for state in own]

    def _count(self, *_: object) -> None:
        self.steps += 1
        stay = self.optimizer.param_groups[0]["block_steps"]
        if self.steps > stay:  # as old are those of the start before
            self.counted += sum(int((age == stay).sum()) for age in self._ages())

    def shares(self) -> dict[str, float]:
        """Of the active coordinates at the end: births per one of them, and born ones' share."""
        if not self.steps:
            return {}
        ages = torch.cat(self._ages())
        return {
            "births": self.counted / len(ages),
            "born": (ages < ages.max()).float().mean().item() if self.counted else 0.0,
        }


def best_exponent(
    trained: Callable[[int], dict[str, Any] | None],
) -> tuple[int, dict[int, float]]:
    """The exponent with the least loss, between two worse ones, and all losses tried."""
    tried: dict[int, float] = {}

    def loss(exponent: int) -> float:
        if exponent not in tried:
            found = trained(exponent)
            if found is None:
                return math.inf
            tried[exponent] = found["loss"]
        return tried[exponent]

    best = 0
    while True:
        around = [e for e in (best - 1, best, best + 1) if abs(e) <= FARTHEST]
        least = min(around, key=loss)
        if least == best:
            return best, tried
        best = least


def report(rows: dict[str, dict[str, Any]], base: float, o: Any) -> str:
    """The table."""
    means = {side: mean([of["loss"] for of in row["found"]]) for side, row in rows.items()}
    lines = []
    for side in sorted(means, key=means.__getitem__):
        row, line = rows[side], {"side": side}
        line["rate"] = f"{row['rate']:g}"
        line["seeds"] = str(len(row["found"]))
        line["validation loss"] = spread([of["loss"] for of in row["found"]], 3)
        for other in SECOND_PLACE:
            if other in rows:
                differences = [
                    a["loss"] - b["loss"]
                    for a, b in zip(row["found"], rows[other]["found"], strict=False)
                ]
                line[f"less {other}'s"] = spread(differences, 3)
        line["CPU ms per step"] = f"{mean([of['cpu_ms'] for of in row['found']]):.0f}"
        for key, title in (("births", "births per nonzero"), ("born", "born, of the nonzeros")):
            values = [of[key] for of in row["found"] if key in of]
            line[title] = f"{mean(values):.2f}" if values else ""
        line["nonzeros"] = f"{row['found'][0]['nonzeros']:,}"
        line["rates tried: loss"] = ", ".join(
            f"{UNIT * 2.0**e:g}: {loss:.3f}" for e, loss in sorted(row["tried"].items())
        )
        lines.append(line)
    return "\n\n".join([
        "# Random coordinate descent beside its peers", *__doc__.strip().split("\n\n")[1:],
        f"CircuitGPT, d_model {o.d_model}, {o.layers} layers, vocabulary {o.vocabulary}, density "
        f"1/{o.inverse_density}, {o.steps} steps of {o.batch} × {CONTEXT} tokens; all begin with "
        f"the bigram counts, which alone, smoothed, have {base:.3f}. {HELD_OUT} validation "
        "sequences. After ± is the standard deviation over seeds; differences are seed by seed.",
        f"Measured on: {machine()}.", table(lines),
    ])  # fmt: skip


if __name__ == "__main__":
    Experiment.main(
        run, __doc__, "rcd_peers", "runs/rcd_peers", d_model=128, layers=2, vocabulary=2048,
        inverse_density=20, steps=600, batch=8, seeds=3, sides=tuple(SIDES),
    )  # fmt: skip
