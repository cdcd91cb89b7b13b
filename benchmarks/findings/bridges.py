"""Bridges from a dense GPT-2 to a sparse twin: how exact they are, and steering through them."""

import argparse
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hf_circuit_sparsity.bridge.initialization import ridge_bridges_
from hf_circuit_sparsity.bridge.modeling_bridge import BridgedCausalLM
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
from hf_circuit_sparsity.circuits.pruning.find import TaskNotLearnedError, find_circuit
from hf_circuit_sparsity.commands.bridge import location_name
from hf_circuit_sparsity.commands.console import say
from hf_circuit_sparsity.commands.train import spread_sample
from hf_circuit_sparsity.tasks.binary_task import BinaryTask
from hf_circuit_sparsity.tasks.load import load_task

from ..speed.measure import machine, save_figure, table, write_text
from .bridge_models import (
    BLOCK_SIZE,
    BRIDGE_BATCH_SIZE,
    BRIDGE_LEARNING_RATE,
    BRIDGE_STEPS,
    FINDINGS,
    FOLDER,
    NMSE_WEIGHT,
    bridge_summary,
    dense_loss,
    fresh_bridge,
    load_models,
    ridge_tokens,
)

TASKS = ("single_double_quote", "while_return_true")
DOSES = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
ROWS = 48  # prompts of each kind that steering is measured on
RANDOM_CHANNELS = 5
# Being trained as a twin, with few steps, costs more than the quickstart's target of 0.15 allows.
CIRCUIT_LOSS = 0.3
TRIED = 12  # channels of the circuit, and as many others, that are tried on training prompts
TRIED_ROWS = 24
TRIED_DOSES = (4.0, 8.0, 16.0, 32.0)
KEYS = ("encode_nmse", "decode_nmse", "dense_to_sparse_kl", "sparse_to_dense_kl")


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


def exactness(
    bridged: BridgedCausalLM, blocks: Any, folder: Path, findings: Path, n_text: int
) -> str:
    """Errors and divergences of four kinds of bridges, as a table."""
    text = torch.tensor(spread_sample(blocks["validation"], n_text)["input_ids"][:])[:n_text]
    fitted_on = ridge_tokens(blocks)
    sides = {"untrained": fresh_bridge(folder / "dense", findings).eval()}
    figures = {"untrained": bridge_figures(sides["untrained"], text)}
    regression = ridge_bridges_(sides["untrained"], fitted_on)
    figures["ridge regression"] = bridge_figures(regression, text)
    figures["trained together"] = bridge_figures(bridged, text)
    refitted = BridgedCausalLM.from_models(bridged.dense, bridged.sparse).eval()
    figures["ridge, to the trained twin"] = bridge_figures(
        ridge_bridges_(refitted, fitted_on), text
    )
    rows = []
    for location in range(bridged.n_locations):
        for side, found in figures.items():
            cells = [f"{found[key][location]:.3f}" for key in KEYS]
            rows.append((location_name(location), side, *cells))
    for side, found in figures.items():
        cells = [f"{sum(found[key]) / bridged.n_locations:.3f}" for key in KEYS]
        rows.append(("**mean**", side, *cells))
    header = ("after", "bridges", "NMSE encoding", "NMSE decoding", "KL dense→sparse",
              "KL sparse→dense")  # fmt: skip
    start, end = figures["untrained"], figures["trained together"]
    return (
        f"{text.numel():,} validation tokens. NMSE is the share of the stream's variance that is "
        "missed (1: no better than its mean); KL is KL(dense ‖ hybrid), nats per token. Validation "
        f"loss of the dense GPT-2 {dense_loss(folder):.2f}, of the sparse model before "
        f"{start['lm']:.2f} and as its trained twin {end['lm']:.2f} nats per token; KL(dense ‖ "
        f"sparse) before {start['kl']:.3f}, after {end['kl']:.3f}.\n\n" + table(header, rows)
    )


def twin_circuit(
    bridged: BridgedCausalLM,
    tokenizer: Any,
    task: BinaryTask,
    blocks: Any,
    folder: Path,
    steps: int,
) -> Circuit | None:
    """The twin's circuit for a task, found before or now; None where it has not learned it."""
    try:
        circuit = Circuit.from_pretrained(folder)
        circuit.check_model(bridged.sparse)
        return circuit
    except (FileNotFoundError, ValueError):
        pass
    try:
        circuit = find_circuit(
            bridged.sparse, tokenizer, task, PruningConfig(steps=steps, target_loss=CIRCUIT_LOSS),
            reference=blocks["train"], progress=False,
        )  # fmt: skip
    except TaskNotLearnedError as error:
        say(f"  {task.name}: {error}")
        return None
    circuit.save_pretrained(folder)
    circuit.plot(folder / "circuit.png", bridged.sparse, tokenizer)
    return circuit


def promising(
    bridged: BridgedCausalLM, task: BinaryTask, target: int, circuit: Circuit | None
) -> tuple[list[SteeringCandidate], list[SteeringCandidate]]:
    """The best channels of the twin's circuit, and the best of the others, to first order.

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
            return answer_probabilities(bridged, tensors, same)[1]

    return max((Choice(c, dose) for c in candidates for dose in TRIED_DOSES), key=moved)


def steering(
    bridged: BridgedCausalLM, tokenizer: Any, blocks: Any, folder: Path, n_text: int, steps: int
) -> tuple[str, str, list[SteeringSweep]]:
    """Tables of the twin's circuits and of steering them in the dense model, and the sweeps."""
    text = torch.tensor(spread_sample(blocks["validation"], n_text)["input_ids"][:])[:n_text]
    circuit_rows, rows, sweeps = [], [], []
    for name in TASKS:
        task = load_task(name, tokenizer, n_train=1000, n_test=256, max_length=BLOCK_SIZE)
        circuit = None
        if steps:
            place = folder / "circuits" / name
            circuit = twin_circuit(bridged, tokenizer, task, blocks, place, steps)
        if circuit is not None:
            m = circuit.metrics
            losses = [f"{m[name]:.3f}" for name in ("model_loss", "circuit_loss", "ablated_loss")]
            circuit_rows.append((name, m["nodes"], m["edges"], *losses, written(circuit)))
        answers = sorted(set(task.test["target_id"]))
        for target in answers:
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
    circuits = table(
        (
            "task",
            "nodes",
            "edges",
            "twin's task loss",
            "circuit's",
            "without the circuit",
            "writes to channels",
        ),
        circuit_rows,
    )
    header = ("task", "steered", "channel", "dose", "p(right answer)", "p(other answer)",
              "random channels: mean (max)", "KL on text", "random: mean")  # fmt: skip
    return circuits, table(header, rows), sweeps


def sweep_rows(sweep: SteeringSweep, choice: Choice, of_circuit: bool = False) -> list[tuple]:
    """The lines of the table about one sweep: up to the dose that was best on training prompts."""
    rows, best = [], choice.candidate
    place = f"{best.channel} after {location_name(best.location)}"
    place += " (circuit's)" if of_circuit else ""
    for dose in (dose for dose in DOSES if dose <= choice.dose):
        i = sweep.strengths.index(dose * best.difference)
        others = [line[i] for line in sweep.random_probability]
        text = [line[i] for line in sweep.random_text_kl]
        rows.append(
            (sweep.task, f"`{sweep.answer!r}` → `{sweep.other!r}`",
             place, f"{dose:g}",
             f"{sweep.answer_probability[i]:.3f}", f"{sweep.other_probability[i]:.3f}",
             f"{sum(others) / len(others):.3f} ({max(others):.3f})",
             f"{sweep.text_kl[i]:.3f}", f"{sum(text) / len(text):.3f}")
        )  # fmt: skip
    return rows


def circuit_pictures(folder: Path, output: Path) -> list[str]:
    """Put the pictures of the twin's circuits beside the report; returns what shows them there."""
    lines = []
    for name in TASKS:
        picture = folder / "circuits" / name / "circuit.png"
        if picture.is_file():
            copied = output.with_name(f"{output.stem}_{name}.png")
            shutil.copyfile(picture, copied)
            lines.append(f"![The twin's circuit for {name}]({copied.name})")
    return lines


def draw(sweeps: Sequence[SteeringSweep], picture: Path) -> None:
    """All sweeps side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(sweeps) / 2, 7), layout="constrained")
    for axes, sweep in zip(figure.subplots(2, len(sweeps) // 2).T.flat, sweeps, strict=True):
        sweep.draw(axes)
    save_figure(figure, picture, dpi=110)


def report(folder: Path, findings: Path, output: Path, n_text: int = 64, steps: int = 200) -> str:
    """Train what is missing and measure everything; writes the report and its picture."""
    began = time.monotonic()
    bridged, tokenizer, blocks = load_models(folder, findings)
    bridged.eval()
    say("Errors and divergences")
    exact = exactness(bridged, blocks, folder, findings, n_text)
    say(exact)
    say("Circuits and steering")
    circuits, steered, sweeps = steering(bridged, tokenizer, blocks, folder, n_text // 4, steps)
    draw(sweeps, output.with_suffix(".png"))
    seconds = bridge_summary(folder)["seconds"]
    training = TRAINING.format(
        steps=BRIDGE_STEPS, tokens=BRIDGE_BATCH_SIZE * BLOCK_SIZE, rate=BRIDGE_LEARNING_RATE,
        weight=NMSE_WEIGHT, minutes=seconds / 60, whole=(time.monotonic() - began) / 60,
    )  # fmt: skip
    text = "\n\n".join([
        "# Bridges", machine("cpu"), training, "## How exact the bridges are", exact,
        "## The twin's circuits", CIRCUITS.format(steps=steps, loss=CIRCUIT_LOSS), circuits,
        *circuit_pictures(folder, output),
        "## Steering the dense model", STEERING, steered,
        f"![Answer probability against strength]({output.with_suffix('.png').name})",
    ])  # fmt: skip
    write_text(output, text + "\n")
    return text


TRAINING = (
    "A dense GPT-2 of 2 layers and width 128, trained on the Python standard library; the "
    "quickstart's sparse model of the same size, which never saw it; and twin and bridges trained "
    "together from there, starting from ridge regression, for {steps} steps of {tokens:,} tokens "
    "({minutes:.0f} minutes; learning rate {rate:g}, weight of the NMSE {weight:g}). See "
    "`bridge_models.py`; every model is one run. The command that wrote this took {whole:.0f} "
    "minutes; it trains only what is not there yet."
)

CIRCUITS = (
    "Losses in nats on held-out prompts; guessing is 0.693. Found with {steps} mask updates and a "
    "target loss of {loss:g}."
)

STEERING = (
    "One channel of the sparse residual stream is moved at every token, the difference decoded and "
    "added to the dense GPT-2's stream. Channel and dose are chosen on training prompts, among the "
    f"{TRIED} channels of the twin's circuit and the {TRIED} others that promise most to first "
    f"order; what is shown is the mean over {ROWS} held-out prompts. The probability of an answer "
    "is that of all tokens that begin with it. Dose 1 is the twin's own mean difference between "
    "the two kinds of prompts. "
    f"The {RANDOM_CHANNELS} random channels move the dense stream by a vector of the same length. "
    "KL on text: KL(unsteered ‖ steered) on unrelated validation text, nats per token."
)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="(default: %(default)s)")
    parser.add_argument("--findings", type=Path, default=FINDINGS, help="(default: %(default)s)")
    parser.add_argument(
        "--output", type=Path, default=Path("bridges.md"), help="(default: %(default)s)"
    )
    options = parser.parse_args()
    say(report(options.folder, options.findings, options.output))
