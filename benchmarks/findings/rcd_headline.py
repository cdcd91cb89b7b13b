"""Wall-clock time in which random coordinate descent reaches what top-k annealed AdamW ends with.

CircuitGPT with d_model 1024 and 4 layers, 1 of 64 weights nonzero, on the standard library. Beside
one long top-k run there are runs of random coordinate descent, planned to take about a third of its
time and about as long, and a top-k run of a third of the steps. All take turns in one process.
Interrupted, it goes on where it was.
"""

import json
from collections import Counter
from typing import Any

from hf_circuit_sparsity.files import replacing
from hf_circuit_sparsity.modeling.configuration_circuitgpt import CircuitGPTConfig

from ..experiment import Experiment, machine, table
from .rcd_race import Run, Training, bigram_loss, builders, race, seconds_to, spread, tokens

DENSITY = 1 / 64
TOPK = {"anneal_start": 0.01, "anneal_end": 0.5}
RCD = {
    "selection": "gradient",
    "greedy_fraction": 1 / 4,
    "block_fraction": 1 / 16,
    "block_steps": 1,
}
COLOURS = {"topk": ("C3", "C1"), "rcd": ("C0", "C2", "C4")}


def run(experiment: Experiment) -> str:
    """Train what is not trained yet, and report; writes the curves as JSON beside the report."""
    o = experiment.options
    data = tokens(experiment.folder, o.vocabulary, o.context)
    blocks, held_out = data["train"], spread(data["validation"], o.held_out)
    bigram, _ = bigram_loss(blocks, data["validation"], o.vocabulary)
    config = CircuitGPTConfig(
        n_layer=o.layers, d_model=o.d_model, d_head=16, block_size=o.context,
        vocab_size=o.vocabulary,
    )  # fmt: skip
    build, build_sparse = builders(config, blocks if o.start_at_bigrams else None, o.seed)
    # The first of the top-k runs is the one whose loss the others are to reach.
    runs = {"topk": Run("topk", o.topk_steps[0], o.topk_lr, o.batch, TOPK, o.seed)}
    for steps in o.rcd_steps:
        runs[f"rcd-{steps}"] = Run("rcd", steps, o.rcd_lr, o.batch, RCD, o.seed)
    for steps in o.topk_steps[1:]:
        runs[f"topk-{steps}"] = Run("topk", steps, o.topk_lr, o.batch, TOPK, o.seed)
    trainings = {
        name: Training(build, run, DENSITY, blocks, held_out, build_sparse)
        for name, run in runs.items()
    }
    race(trainings, experiment.folder, o.turn, o.evaluations)
    return report(experiment, trainings, bigram)


def report(experiment: Experiment, trainings: dict[str, Training], bigram: float) -> str:
    """The table, the picture and the curves of finished trainings."""
    o, goal = experiment.options, trainings["topk"].curve[-1]
    curves = {name: training.curve for name, training in trainings.items()}
    rows, reached = [], {}
    for name, training in trainings.items():
        last = training.curve[-1]
        when = {c: seconds_to(training.curve, goal["loss"], c) for c in ("seconds", "cpu_seconds")}
        reached[name] = when
        shown = ["not reached"] * 2
        if when["seconds"] is not None:
            shown = [f"{when[c]:.0f} s ({when[c] / goal[c]:.2f})" for c in when]
        rows.append(
            {
                "run": name,
                "steps": training.plan.steps,
                "tokens": f"{last['tokens']:,}",
                "validation loss": f"{last['loss']:.4f}",
                "nonzeros": f"{training.nonzeros()[0]:,}",
                "ms per step": f"{1e3 * last['seconds'] / training.done:.0f}",
                "seconds": f"{last['seconds']:.0f}",
                "CPU seconds": f"{last['cpu_seconds']:.0f}",
                "reaches topk's loss after (share of its time)": shown[0],
                "the same in CPU seconds": shown[1],
            }
        )
    content = {
        "arguments": vars(o),
        "bigram_loss": bigram,
        "topk": TOPK,
        "rcd": RCD,
        "reached": reached,
        "curves": curves,
    }
    with replacing(experiment.results / f"{experiment.name}.json") as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    def draw(both: Any) -> None:
        left, right = both
        used: Counter[str] = Counter()
        for name, curve in curves.items():
            kind = name.split("-")[0]
            colour = COLOURS[kind][used[kind] % len(COLOURS[kind])]
            used[kind] += 1
            losses = [point["loss"] for point in curve]
            left.plot([point["seconds"] / 60 for point in curve], losses, colour, label=name)
            right.plot([point["tokens"] / 1e6 for point in curve], losses, colour, label=name)
        every = [point["loss"] for curve in curves.values() for point in curve]
        top = min(max(every) + 0.1, min(every) + 1.7)
        for axes, label in ((left, "minutes"), (right, "million tokens")):
            axes.axhline(goal["loss"], color="C3", linestyle=":", label="where topk ends")
            axes.axhline(bigram, color="0.5", linestyle="--", label="bigram table alone")
            axes.set(xlabel=label, ylim=(min(every) - 0.1, top))
        left.set(ylabel="validation loss (nats per token)", title="against wall-clock time")
        right.set(title="against tokens")
        right.legend()

    picture = experiment.picture(draw, "Loss against time and tokens", (10, 4), ncols=2)
    return (
        f"# Time to the loss of top-k annealed AdamW\n\n{machine()}\n\n"
        f"CircuitGPT, d_model {o.d_model}, {o.layers} layers, density 1/64, vocabulary "
        f"{o.vocabulary}, context {o.context}, {o.batch} sequences per step; validation on "
        f"{o.held_out} sequences. The bigram table alone (counts of the whole training text, "
        f"smoothed): {bigram:.4f}. "
        + ("All begin with these counts. " if o.start_at_bigrams else "")
        + f"Seed {o.seed}. Runs took turns; a clock counts training only.\n\n{table(rows)}\n\n"
        f"topk: lr {o.topk_lr}, {TOPK}\n\nrcd: lr {o.rcd_lr}, {RCD}\n\n{picture}"
    )


if __name__ == "__main__":
    Experiment.main(
        run, __doc__, "rcd_headline", "runs/rcd_headline", d_model=1024, layers=4, batch=8,
        context=128, vocabulary=512, held_out=128, topk_steps=(600,), rcd_steps=(300, 450),
        topk_lr=1e-3, rcd_lr=1e-3, start_at_bigrams=False, seed=0, turn=60.0, evaluations=25,
    )  # fmt: skip
