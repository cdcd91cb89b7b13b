"""What an hour of training gives at the size of GPT-2 small, to random coordinate descent on
nonzeros, to AdamW and to top-k annealed AdamW.

The architecture of transformers from random weights, a BPE of GPT-2's vocabulary trained on the
standard library, and that library to read. Each side first looks for its learning rate, a factor of
two apart, in short trainings of equal time, until the best lies between two worse ones. Then all
take turns in one process, each with its own clock, which stands still while others run or it is
evaluated. Interrupted, it goes on where it was.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_circuit_sparsity.commands.console import say
from hf_circuit_sparsity.optim.sparse_init import sparse_from_config

from ..experiment import Experiment, machine, stored, table
from .rcd_peers import UNIT, best_exponent
from .rcd_race import Run, Training, race, seconds_to, spread, tokens
from .rcd_true_size import DENSITY, config_of

ADAMW = "AdamW"
SIDES: dict[str, tuple[str, dict[str, Any]]] = {
    "RCD": ("rcd", {"selection": "gradient", "greedy_fraction": 1 / 4, "block_fraction": 1 / 64}),
    ADAMW: ("adamw", {"fused": True}),
    "top-k": ("topk", {}),
}
# What transformers drops by default would cost every side alike, and says nothing in one epoch.
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
TIMED = 5


def run(experiment: Experiment) -> str:
    """Look for rates, race, and report; what is stored is not repeated."""
    o = experiment.options
    torch.set_num_threads(o.threads)
    vocabulary = config_of("GPT-2 small").vocab_size
    data = tokens(experiment.folder, vocabulary, o.context)
    held_out = spread(data["validation"], o.held_out)
    begin = partial(_begin, data["train"], held_out, o.batch)
    trainings, rates = {}, {}
    for side in SIDES:
        per_step = stored(experiment.folder / f"{side} step.json", partial(_timed, begin, side))
        rates[side] = best_exponent(
            lambda e, side=side, seconds=per_step: _tried(experiment, begin, side, e, seconds)
        )
        steps = max(TIMED, int(o.seconds / per_step))
        trainings[side] = begin(side, steps, UNIT * 2.0 ** rates[side][0])
    race(trainings, experiment.folder, o.turn, o.evaluations)
    return report(experiment, trainings, rates)


def _begin(
    blocks: torch.Tensor, held_out: torch.Tensor, batch: int, side: str, steps: int, rate: float
) -> Training:
    config = config_of("GPT-2 small")
    config.update(NO_DROPOUT)
    method, settings = SIDES[side]
    make: Callable[[], PreTrainedModel] = partial(AutoModelForCausalLM.from_config, config)
    return Training(
        make, Run(method, steps, rate, batch, settings), DENSITY, blocks, held_out,
        partial(sparse_from_config, config, seed=0),
    )  # fmt: skip


def _timed(begin: Callable[..., Training], side: str) -> float:
    """Seconds of a step, without the first, which allocates; of top-k half dense, half sparse."""
    training = begin(side, 2 * TIMED, UNIT)
    training.run(1)
    before = time.perf_counter()
    training.run(2 * TIMED)
    seconds = (time.perf_counter() - before) / (2 * TIMED - 1)
    training.close()
    say(f"{side}: {seconds:.2f} s per step")
    return seconds


def _tried(
    experiment: Experiment, begin: Callable[..., Training], side: str, exponent: int, seconds: float
) -> dict[str, Any]:
    def measure() -> dict[str, Any]:
        steps = max(TIMED, int(experiment.options.search_seconds / seconds))
        training = begin(side, steps, UNIT * 2.0**exponent)
        training.run(steps)
        loss = training.evaluate()
        training.close()
        say(f"{side}, rate {UNIT * 2.0**exponent:g}: {loss:.4f}")
        return {"loss": loss}

    return stored(experiment.folder / f"{side} rate {exponent}.json", measure)


def report(
    experiment: Experiment,
    trainings: dict[str, Training],
    rates: dict[str, tuple[int, dict[int, float]]],
) -> str:
    """The table and the picture of finished trainings."""
    o, lines = experiment.options, []
    goal = trainings[ADAMW].curve[-1]["loss"]
    for side, training in trainings.items():
        last, (best, tried) = training.curve[-1], rates[side]
        when = seconds_to(training.curve, goal)
        lines.append({
            "side": side,
            "held-out loss": f"{last['loss']:.3f}",
            "less AdamW's": f"{last['loss'] - goal:+.3f}",
            "AdamW's loss after": "–" if when is None else f"{when / 60:.0f} min",
            "minutes": f"{last['seconds'] / 60:.1f}",
            "steps": f"{training.done:,}",
            "tokens": f"{last['tokens']:,}",
            "rate": f"{UNIT * 2.0**best:g}",
            "rates tried: loss": ", ".join(
                f"{UNIT * 2.0**e:g}: {loss:.2f}" for e, loss in sorted(tried.items())
            ),
        })  # fmt: skip

    def draw(axes: Any) -> None:
        for side, training in trainings.items():
            curve = training.curve
            axes.plot([p["seconds"] / 60 for p in curve], [p["loss"] for p in curve], label=side)
        axes.set(xlabel="minutes of training", ylabel="held-out loss (nats per token)")
        axes.legend()

    picture = experiment.picture(draw, "Held-out loss against minutes")
    return "\n\n".join([
        "# An hour at the size of GPT-2 small", *__doc__.strip().split("\n\n")[1:],
        f"Measured on: {machine()}. Steps of {o.batch} × {o.context} tokens, density 1/64 but for "
        f"AdamW; {o.held_out} held-out sequences. One seed. Rates were searched in trainings of "
        f"{o.search_seconds:.0f} s each.",
        table(lines), picture,
    ])  # fmt: skip


if __name__ == "__main__":
    Experiment.main(
        run, __doc__, "rcd_one_hour", "runs/rcd_one_hour", seconds=3600.0, search_seconds=150.0,
        threads=2, batch=8, context=128, held_out=128, turn=300.0, evaluations=24,
    )  # fmt: skip
