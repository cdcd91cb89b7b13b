"""Two ranks that share the coordinates: what waiting less costs, and what averaging gives.

For every way of sharing, several learning rates and seeds; a table compares each at its best rate.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from hf_circuit_sparsity.commands.console import say
from hf_circuit_sparsity.files import replacing
from hf_circuit_sparsity.modeling.configuration_circuitgpt import CircuitGPTConfig
from hf_circuit_sparsity.optim.rcd.distributed import RCDProcessGroup

from ..experiment import Experiment, grouped, machine, mean, table
from ..experiment import spread as mean_and_deviation
from .rcd_race import Run, Training, builders, spread, tokens

RANKS = 2
DENSITY = 1 / 16
RATES = (1e-3, 3e-3, 1e-2)
HIGHER = (*RATES, 3e-2)  # where the best of the others was the last
# The settings, the learning rates, and so many times the steps.
WAYS: dict[str, tuple[dict[str, Any], tuple[float, ...], float]] = {
    "0 steps late": ({}, HIGHER, 1),
    "1 step late": ({"staleness": 1}, HIGHER, 1),
    "4 steps late": ({"staleness": 4}, RATES, 1),
    "16 steps late": ({"staleness": 16}, RATES, 1),
    "averaged": ({"average_gradients": True}, HIGHER, 1),
    "0 steps late, 1.6 × the steps": ({}, (1e-2,), 1.6),  # about the bytes of "averaged"
}


def _settings(options: Any) -> list[dict[str, Any]]:
    return [
        {"way": way, "lr": lr, "seed": seed}
        for way, (_, rates, _) in reversed(WAYS.items())
        for lr in reversed(rates)
        for seed in range(options.seeds)
    ]


def _train(
    rank: int, setting: dict[str, Any], data: dict[str, torch.Tensor], options: Any
) -> dict[str, Any]:
    """Validation loss, and bytes that a rank hands over per step."""
    config = CircuitGPTConfig(
        n_layer=options.layers,
        d_model=options.width,
        d_head=16,
        block_size=options.context,
        vocab_size=options.vocabulary,
        enable_bigram_table=False,
    )
    group = RCDProcessGroup(average_dense=True)
    own, _, longer = WAYS[setting["way"]]
    settings = {
        "selection": "gradient",
        "block_fraction": 1 / 8,
        "process_group": group,
        **own,
    }
    steps = round(longer * options.steps)
    dense, sparse = builders(config, None, setting["seed"])
    plan = Run("rcd", steps, setting["lr"], options.batch, settings, setting["seed"])
    held_out = spread(data["validation"], 96)
    training = Training(dense, plan, DENSITY, data["train"], held_out, sparse)
    training.order = training.order[rank::RANKS]  # every rank has data of its own
    training.run(steps)
    loss = training.evaluate() if rank == 0 else 0.0
    training.close()
    dist.barrier()  # what is still on its way belongs to this training
    return {**setting, "loss": loss, "bytes": group.bytes_sent / steps}


def _rank(rank: int, store: str, folder: Path, options: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    data = tokens(folder, options.vocabulary, options.context)
    path = folder / "ranks.json"
    done = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    dist.barrier()
    known = [{name: row[name] for name in ("way", "lr", "seed")} for row in done]
    for setting in _settings(options):
        if setting in known:
            continue
        done.append(_train(rank, setting, data, options))
        if rank == 0:
            say(str(done[-1]))
            with replacing(path) as temporary:
                temporary.write_text(json.dumps(done, indent=1) + "\n", encoding="utf-8")
    dist.destroy_process_group()


def run(experiment: Experiment) -> str:
    """The table."""
    options, folder = experiment.options, experiment.folder
    folder.mkdir(parents=True, exist_ok=True)
    if not experiment.stored_only:
        tokens(folder, options.vocabulary, options.context)  # once, before the ranks ask for them
        with tempfile.TemporaryDirectory() as connection:
            mp.spawn(_rank, (f"{connection}/store", folder, options), nprocs=RANKS)
    stored = json.loads((folder / "ranks.json").read_text(encoding="utf-8"))
    wanted = _settings(options)
    stored = [row for row in stored if {n: row[n] for n in ("way", "lr", "seed")} in wanted]
    rows = []
    for way, (_, _, longer) in WAYS.items():
        of_way = [row for row in stored if row["way"] == way]
        losses = {
            lr: [row["loss"] for row in of_rate] for (lr,), of_rate in grouped(of_way, "lr").items()
        }
        best = min(losses, key=lambda lr: mean(losses[lr]))
        sent = mean([row["bytes"] for row in of_way if row["lr"] == best])
        rows.append(
            {"gradients": way}
            | {f"at {lr:g}": mean_and_deviation(losses.get(lr, []), 3) for lr in HIGHER}
            | {
                "loss at the best rate": f"{mean(losses[best]):.3f}",
                "bytes per step": f"{sent:,.0f}",
                "MB in all": f"{sent * round(longer * options.steps) / 1e6:.2f}",
            }
        )
    return (
        f"# Two ranks that share the coordinates\n\n{machine()}\n\nCircuitGPT, d_model "
        f"{options.width}, {options.layers} layer(s), no bigram table, vocabulary "
        f"{options.vocabulary}, density 1/16; {RANKS} ranks, each {options.batch} × "
        f"{options.context} tokens of its own in each of {options.steps} steps; validation loss, "
        f"mean and standard deviation of {options.seeds} seeds; bytes that a rank hands over, "
        f"dense gradients included, at the best rate.\n\n{table(rows)}"
    )


if __name__ == "__main__":
    Experiment.main(
        run, __doc__, "rcd_ranks", "runs/rcd_ranks",
        width=64, layers=1, vocabulary=512, context=64, batch=4, steps=120, seeds=3,
    )  # fmt: skip
