"""Bridges from a dense GPT-2 to a sparse model: how exact they are, and steering through them."""

import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hf_circuit_sparsity.bridge.initialization import ridge_bridges_
from hf_circuit_sparsity.bridge.intervention import location_name
from hf_circuit_sparsity.bridge.modeling_bridge import BridgedCausalLM
from hf_circuit_sparsity.bridge.priced_steering import (
    PricedSteering,
    best_at_price,
    channel_shifts,
    mean_difference_shifts,
)
from hf_circuit_sparsity.bridge.steering import (
    SteeringCandidate,
    SteeringSweep,
    answer_probabilities,
    answer_rows,
    steering_candidates,
    steering_sweep,
    tokens_beginning_alike,
)
from hf_circuit_sparsity.circuits.circuit import Circuit
from hf_circuit_sparsity.circuits.pruning.config import PruningConfig
from hf_circuit_sparsity.circuits.pruning.find import TaskNotLearnedError
from hf_circuit_sparsity.circuits.viewer.plot import plot_circuit
from hf_circuit_sparsity.commands.console import say
from hf_circuit_sparsity.tasks.binary_task import BinaryTask
from hf_circuit_sparsity.tasks.load import load_task

from ..experiment import Experiment, machine, mean, table
from .bridge_models import (
    BLOCK_SIZE,
    BRIDGE,
    BRIDGE_BATCH_SIZE,
    BRIDGE_LEARNING_RATE,
    BRIDGE_STEPS,
    DENSE,
    FOLDER,
    NMSE_WEIGHT,
    circuit_of,
    fresh_bridge,
    load_models,
    ridge_tokens,
    sample_text,
    summary,
)

TASKS = ("single_double_quote", "while_return_true")
DOSES = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
ROWS = 48  # prompts of each kind that steering is measured on
RANDOM_CHANNELS = 5
# A few steps of training beside a dense model cost more than the usual target of 0.15 allows.
CIRCUIT_LOSS = 0.3
TRIED = 12  # channels of the circuit, and as many others, that are tried on training prompts
TRIED_ROWS = 24
TRIED_DOSES = (4.0, 8.0, 16.0, 32.0)
PRICES = (0.03, 0.1, 0.3)  # KL on text, nats per token, at which directions are compared
CONTROLS = 5  # draws of as many unranked channels
KEYS = {
    "encode_nmse": "NMSE encoding",
    "decode_nmse": "NMSE decoding",
    "dense_to_sparse_kl": "KL dense→sparse",
    "sparse_to_dense_kl": "KL sparse→dense",
}


@torch.no_grad()
def bridge_figures(bridged: BridgedCausalLM, text: torch.Tensor) -> dict[str, Any]:
    """Every term of the loss on `text` `(n, T)`, by location where there is one for each."""
    everywhere = range(bridged.n_locations)
    sums: dict[str, Any] = {}
    batches = text.split(16)
    for ids in batches:
        output = bridged(ids, labels=ids, enter_at=everywhere, leave_at=everywhere)
        for name in (*KEYS, "lm", "kl"):
            sums[name] = sums.get(name, 0.0) + output[name] / len(batches)
    return {name: value.tolist() for name, value in sums.items()}


def exactness(bridged: BridgedCausalLM, blocks: Any, folder: Path, text: torch.Tensor) -> str:
    """Errors and divergences of four kinds of bridges, as a table."""
    fitted_on = ridge_tokens(blocks)
    fresh = fresh_bridge(folder).eval()
    figures = {"untrained": bridge_figures(fresh, text)}
    figures["ridge regression"] = bridge_figures(ridge_bridges_(fresh, fitted_on), text)
    figures["trained together"] = bridge_figures(bridged, text)
    refitted = BridgedCausalLM.from_models(bridged.dense, bridged.sparse).eval()
    ridge_bridges_(refitted, fitted_on)
    figures["ridge, to the trained sparse model"] = bridge_figures(refitted, text)
    rows = []
    for location in [*range(bridged.n_locations), None]:
        for side, found in figures.items():
            row = {"after": "**mean**" if location is None else location_name(location)}
            row["bridges"] = side
            for key, label in KEYS.items():
                value = mean(found[key]) if location is None else found[key][location]
                row[label] = f"{value:.3f}"
            rows.append(row)
    start, end = figures["untrained"], figures["trained together"]
    dense_loss = summary(folder, DENSE)["eval_loss"]
    return (
        f"{text.numel():,} validation tokens. NMSE is the share of the stream's variance that is "
        "missed (1: no better than its mean); KL is KL(dense ‖ hybrid), nats per token. Validation "
        f"loss of the dense GPT-2 {dense_loss:.2f}, of the sparse model before "
        f"{start['lm']:.2f} and after training {end['lm']:.2f} nats per token; KL(dense ‖ "
        f"sparse) before {start['kl']:.3f}, after {end['kl']:.3f}.\n\n{table(rows)}"
    )


def promising(
    bridged: BridgedCausalLM, task: BinaryTask, target: int, circuit: Circuit | None
) -> tuple[list[SteeringCandidate], list[SteeringCandidate]]:
    """The best channels of the sparse model's circuit, and the best of the others, to first order.

    A small circuit may say with one channel, by its sign, what the dense model keeps in two.
    """
    own: list[SteeringCandidate] = []
    if circuit is not None:
        own = steering_candidates(bridged, task, target, circuit=circuit, rows=ROWS)[:TRIED]
    everywhere = steering_candidates(bridged, task, target, rows=ROWS)
    return own, [candidate for candidate in everywhere if candidate not in own][:TRIED]


class Choice(NamedTuple):
    """The channel to steer, and how far."""

    candidate: SteeringCandidate
    dose: float


def written(circuit: Circuit) -> str:
    """The channels of the residual stream that a circuit writes to, by block."""
    blocks = []
    for site, nodes in sorted(circuit.nodes.items()):
        _, layer, part, name = site.split(".")
        if name == "resid_delta":
            location = 2 * int(layer) + (1 if part == "attn" else 2)
            blocks.append(f"{location_name(location)}: {', '.join(map(str, nodes))}")
    return "; ".join(blocks)


@torch.no_grad()
def choose_channel(
    bridged: BridgedCausalLM,
    tokenizer: Any,
    task: BinaryTask,
    target: int,
    candidates: Sequence[SteeringCandidate],
) -> Choice:
    """Of the most promising channels, the one that moves the answer most on training prompts.

    What a channel should do to first order does not tell what it does: the one that carries an
    answer away may not bring the other.
    """
    tensors = answer_rows(task, "train", target, TRIED_ROWS)
    same = tokens_beginning_alike(tokenizer, tensors)

    def moved(choice: Choice) -> float:
        candidate, dose = choice
        strength = dose * candidate.difference
        with bridged.steer(candidate.location, candidate.channel, strength):
            return answer_probabilities(bridged.dense, tensors, same)[1]

    return max((Choice(c, dose) for c in candidates for dose in TRIED_DOSES), key=moved)


def steering(
    experiment: Experiment, bridged: BridgedCausalLM, tokenizer: Any, blocks: Any
) -> tuple[str, str, str, list[SteeringSweep]]:
    """The sparse model's circuits, their steering by dose and at fixed prices, all as Markdown, and
    the sweeps."""
    options = experiment.options
    text = sample_text(blocks["validation"], options.text // 4)
    circuit_rows, pictures, rows, priced, sweeps = [], [], [], [], []
    for name in TASKS:
        task = load_task(name, tokenizer, n_train=1000, n_test=256, max_length=BLOCK_SIZE)
        folder = experiment.folder / "bridges" / "circuits" / name
        config = PruningConfig(max_steps=options.steps, target_loss=CIRCUIT_LOSS)
        circuit = None
        try:
            circuit = circuit_of(bridged.sparse, task, blocks, folder, config)
        except TaskNotLearnedError as error:
            say(f"  {task.name}: {error}")
        else:
            m = circuit.metrics
            circuit_rows.append(
                {
                    "task": name,
                    "nodes": m["nodes"],
                    "edges": m["edges"],
                    "sparse model's task loss": f"{m['model_loss']:.3f}",
                    "circuit's": f"{m['circuit_loss']:.3f}",
                    "without the circuit": f"{m['ablated_loss']:.3f}",
                    "writes to channels": written(circuit),
                }
            )
            picture = experiment.results / f"{experiment.name}_{name}.png"
            plot_circuit(circuit, picture, bridged.sparse, tokenizer)
            pictures.append(f"![The sparse model's circuit for {name}]({picture.name})")
        for target in sorted(set(task.test["target_id"])):
            own, others = promising(bridged, task, target, circuit)
            choice = choose_channel(bridged, tokenizer, task, target, own + others)
            best = choice.candidate
            say(f"  {name}: channel {best.channel} at location {best.location}")
            sweep = steering_sweep(
                bridged, task, target, best.location, best.channel,
                [dose * best.difference for dose in DOSES], text=text, rows=ROWS,
                random_channels=RANDOM_CHANNELS, tokenizer=tokenizer,
            )  # fmt: skip
            sweeps.append(sweep)
            rows += sweep_rows(sweep, choice, best in own)
            priced += at_a_price(bridged, tokenizer, task, target, own + others, text)
    return "\n\n".join([table(circuit_rows), *pictures]), table(rows), table(priced), sweeps


def at_a_price(
    bridged: BridgedCausalLM,
    tokenizer: Any,
    task: BinaryTask,
    target: int,
    ranked: Sequence[SteeringCandidate],
    text: torch.Tensor,
) -> list[dict[str, str]]:
    """Per price one line: the ranked channels, as many of no rank, and the difference of means."""
    same = tokens_beginning_alike(tokenizer, answer_rows(task, "test", target, ROWS))
    everywhere = steering_candidates(bridged, task, target, rows=ROWS)
    unranked = [c for c in everywhere if c not in ranked]
    draw = random.Random(0)
    draws = [draw.sample(unranked, len(ranked)) for _ in range(CONTROLS)]
    means = mean_difference_shifts(bridged.dense, task, target, ROWS)
    row = next(r for r in task.test if r["target_id"] == target)
    turned = f"`{row['target']!r}` → `{row['counterfactual_target']!r}`"
    rows = []
    for price in PRICES:

        def best(shifts: Sequence[Any], price: float = price) -> PricedSteering:
            return best_at_price(
                bridged.dense, task, target, shifts, text, price, rows=ROWS, same=same
            )

        of_means, channel = best(means), best(channel_shifts(bridged, ranked))
        controls = [best(channel_shifts(bridged, some)).other_probability for some in draws]
        rows.append(
            {
                "task": task.name,
                "steered": turned,
                "KL on text": f"{price:g}",
                "unsteered": f"{channel.unsteered_probability:.3f}",
                "best ranked channel": f"{channel.other_probability:.3f} "
                f"({channel.shift.channel} after {location_name(channel.shift.location)})",
                "best of as many unranked, mean (range)": f"{mean(controls):.3f} "
                f"({min(controls):.3f}–{max(controls):.3f})",
                "difference of means on the dense stream": f"{of_means.other_probability:.3f} "
                f"(after {location_name(of_means.shift.location)})",
            }
        )
    return rows


def sweep_rows(
    sweep: SteeringSweep, choice: Choice, of_circuit: bool = False
) -> list[dict[str, object]]:
    """The lines of the table about one sweep: up to the dose that was best on training prompts."""
    rows, best = [], choice.candidate
    for dose in (dose for dose in DOSES if dose <= choice.dose):
        i = sweep.strengths.index(dose * best.difference)
        others = [line[i] for line in sweep.random_probability]
        rows.append(
            {
                "task": sweep.task,
                "steered": f"`{sweep.answer!r}` → `{sweep.other!r}`",
                "channel": f"{best.channel} after {location_name(best.location)}"
                + (" (circuit's)" if of_circuit else ""),
                "dose": f"{dose:g}",
                "p(right answer)": f"{sweep.answer_probability[i]:.3f}",
                "p(other answer)": f"{sweep.other_probability[i]:.3f}",
                "random channels: mean (max)": f"{mean(others):.3f} ({max(others):.3f})",
                "KL on text": f"{sweep.text_kl[i]:.3f}",
                "random: mean": f"{mean([line[i] for line in sweep.random_text_kl]):.3f}",
            }
        )
    return rows


def draw(experiment: Experiment, sweeps: Sequence[SteeringSweep]) -> str:
    """All sweeps side by side."""

    def both(axes: Any) -> None:
        for one, sweep in zip(axes.T.flat, sweeps, strict=True):
            sweep.draw(one)

    half = len(sweeps) // 2
    title = "Answer probability against strength"
    return experiment.picture(both, title, (5 * half, 7), dpi=110, nrows=2, ncols=half)


def run(experiment: Experiment) -> str:
    """Train what is missing and measure everything; returns the report."""
    began = time.monotonic()
    folder, options = experiment.folder, experiment.options
    bridged, tokenizer, blocks = load_models(folder)
    bridged.eval()
    say("Errors and divergences")
    text = sample_text(blocks["validation"], options.text)
    exact = exactness(bridged, blocks, folder, text)
    say("Circuits and steering")
    circuits, steered, priced, sweeps = steering(experiment, bridged, tokenizer, blocks)
    training = TRAINING.format(
        minutes=summary(folder, BRIDGE)["seconds"] / 60, whole=(time.monotonic() - began) / 60
    )
    found = (
        "Losses in nats on held-out prompts; guessing is 0.693. Found with "
        f"{options.steps} mask updates and a target loss of {CIRCUIT_LOSS:g}."
    )
    return "\n\n".join(
        [
            "# Bridges", machine(), training, "## How exact the bridges are", exact,
            "## The sparse model's circuits", found, circuits,
            "## Steering the dense model", STEERING, steered, draw(experiment, sweeps),
            "## Steering at a fixed price", PRICED, priced,
        ]
    )  # fmt: skip


TRAINING = (
    "A dense GPT-2 of 2 layers and width 128, trained on the Python standard library; the "
    "quickstart's sparse model of the same size, which never saw it; and that model and bridges "
    f"trained together from there, starting from ridge regression, for {BRIDGE_STEPS} steps of "
    f"{BRIDGE_BATCH_SIZE * BLOCK_SIZE:,} tokens ({{minutes:.0f}} minutes; learning rate "
    f"{BRIDGE_LEARNING_RATE:g}, weight of the NMSE {NMSE_WEIGHT:g}). See `bridge_models.py`; every "
    "model is one run. The command that wrote this took {whole:.0f} minutes; it trains only what "
    "is not there yet."
)

STEERING = (
    "One channel of the sparse residual stream is moved at every token, the difference decoded and "
    "added to the dense GPT-2's stream. Channel and dose are chosen on training prompts, among the "
    f"{TRIED} channels of the circuit and the {TRIED} others that promise most to first "
    f"order; what is shown is the mean over {ROWS} held-out prompts. The probability of an answer "
    "is that of all tokens that begin with it. Dose 1 is that channel's mean difference between "
    "the two kinds of prompts. "
    f"The {RANDOM_CHANNELS} random channels move the dense stream by a vector of the same length. "
    "KL on text: KL(unsteered ‖ steered) on unrelated validation text, nats per token."
)

PRICED = (
    "Mean probability of the other answer on held-out prompts, each direction followed as far as "
    "the KL on unrelated text allows (all tokens are moved). The best direction is chosen on "
    f"training prompts at that price, alike for all: of the {2 * TRIED} channels that promise most "
    "(the circuit's and others, as above), of as many channels drawn from all others, each moved "
    f"towards its own mean difference ({CONTROLS} draws), and of the difference of means between "
    "the two kinds of prompts at every location of the dense stream, which needs no sparse model."
)


if __name__ == "__main__":
    Experiment.main(run, __doc__, "bridges", str(FOLDER), text=64, steps=200)
