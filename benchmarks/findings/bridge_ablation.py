"""What makes bridges worse than ridge regression when they are trained, and what makes them better.

Sparse model and bridges are trained together for a few steps, each time with one change.
"""

import copy
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PrinterCallback, TrainerCallback, set_seed

from hf_circuit_sparsity.bridge.bridge_config import BridgeTrainingArguments
from hf_circuit_sparsity.bridge.bridge_trainer import BridgeTrainer
from hf_circuit_sparsity.bridge.initialization import ridge_bridges_
from hf_circuit_sparsity.bridge.modeling_bridge import BridgedCausalLM
from hf_circuit_sparsity.commands.console import say

from ..experiment import Experiment, machine, mean, stored, table
from .bridge_models import (
    BLOCK_SIZE,
    BRIDGE_BATCH_SIZE,
    BRIDGE_LEARNING_RATE,
    DENSITY,
    FOLDER,
    NMSE_WEIGHT,
    ensure_dense,
    fresh_bridge,
    ridge_tokens,
    sample_text,
)
from .bridges import KEYS, bridge_figures

N_TEXT = 32


@dataclass(frozen=True)
class Variant:
    """What is done otherwise."""

    learning_rate: float = BRIDGE_LEARNING_RATE
    nmse_weight: float = NMSE_WEIGHT
    units: bool = True
    """Whether bridges read and write the dense stream in standard units."""
    sharkfin: bool = False
    """Whether the bridges, which are dense, have the sparse model's learning rate."""
    hybrids: bool = True


_FORMER = Variant(learning_rate=3e-3, nmse_weight=1.0, units=False, sharkfin=True)

VARIANTS: dict[str, Variant] = {
    "as the benchmark does": Variant(),
    "weight of the NMSE 1": Variant(nmse_weight=1.0),
    "no hybrid runs": Variant(hybrids=False),
    "dense stream in its own units": Variant(units=False),
    "learning rate of bridges with sharkfin": Variant(sharkfin=True),
    "learning rate 3e-3": Variant(learning_rate=3e-3),
    "all as before: own units, sharkfin, 3e-3, weight 1": _FORMER,
    "as before, but standard units": replace(_FORMER, units=True),
    "as before, a tenth of the learning rate": replace(_FORMER, learning_rate=3e-4),
    "that in standard units": replace(_FORMER, learning_rate=3e-4, units=True),
}


@torch.no_grad()
def without_units_(bridged: BridgedCausalLM) -> BridgedCausalLM:
    """Fold the standardization into the weights, so that the maps stay as they are."""
    for bridge in bridged.bridges:
        encoder, decoder = bridge.encoder, bridge.decoder
        encoder.weight /= bridge.dense_scale
        encoder.bias -= encoder.weight @ bridge.dense_mean
        decoder.weight *= bridge.dense_scale[:, None]
        decoder.bias.copy_(bridge.dense_mean + bridge.dense_scale * decoder.bias)
        bridge.dense_mean.zero_()
        bridge.dense_scale.fill_(1.0)
    return bridged


class _Trainer(BridgeTrainer):
    """A [`BridgeTrainer`] whose bridges may have the sparse model's learning rate."""

    sharkfin_everywhere = False

    def _param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        groups = super()._param_groups(model)
        return [{**g, "sharkfin": True} for g in groups] if self.sharkfin_everywhere else groups


class _Largest(TrainerCallback):
    nmse = 0.0

    def on_log(self, args: Any, state: Any, control: Any, logs: dict, **kwargs: Any) -> None:
        self.nmse = max(self.nmse, logs.get("nmse", 0.0))


@torch.no_grad()
def stream_length(bridged: BridgedCausalLM, text: torch.Tensor) -> float:
    """The standard deviation of the sparse model's stream after its last block, over tokens."""
    stream = bridged.sparse_stream
    x = stream.run(*stream.embed(text, None))[-1].flatten(0, 1)
    return (x - x.mean(0)).square().sum(-1).mean().sqrt().item()


def measure(
    bridged: BridgedCausalLM, variant: Variant | None, blocks: Any, steps: int, folder: Path
) -> dict[str, Any]:
    """Train a copy of `bridged` as `variant` says (not at all if `None`) and measure it."""
    set_seed(0)
    bridged = copy.deepcopy(bridged)
    largest = _Largest()
    if variant is not None:
        if not variant.units:
            without_units_(bridged)
        hybrid = 1.0 if variant.hybrids else 0.0
        arguments = BridgeTrainingArguments(
            str(folder), max_steps=steps, learning_rate=variant.learning_rate,
            nmse_weight=variant.nmse_weight, dense_to_sparse_weight=hybrid,
            sparse_to_dense_weight=hybrid, standardize_bridges=variant.units,
            target_density=DENSITY, anneal_start=0.0, anneal_end=0.0,
            per_device_train_batch_size=BRIDGE_BATCH_SIZE, logging_steps=1, save_strategy="no",
            report_to="none", disable_tqdm=True,
        )  # fmt: skip
        trainer = _Trainer(bridged, arguments, train_dataset=blocks["train"], callbacks=[largest])
        trainer.sharkfin_everywhere = variant.sharkfin
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    text = sample_text(blocks["validation"], N_TEXT)
    bridged.eval()
    found = bridge_figures(bridged, text)
    return {**found, "largest": largest.nmse, "length": stream_length(bridged, text)}


def run(experiment: Experiment) -> str:
    """Measure every variant that has not been measured yet, and return the table."""
    folder, steps = experiment.folder, experiment.options.steps
    _, blocks = ensure_dense(folder)
    measured = folder / "bridges" / f"ablation-{steps}"
    start = ridge_bridges_(fresh_bridge(folder), ridge_tokens(blocks))
    rows = []
    regression: dict[str, Any] = {}
    for name, variant in {"ridge regression": None, **VARIANTS}.items():
        found = stored(
            measured / f"{re.sub(r'[^a-zA-Z0-9]+', '-', name)}.json",
            lambda variant=variant: measure(start, variant, blocks, steps, measured / "run"),
        )
        regression = regression or found
        pairs = [pair for key in KEYS for pair in zip(found[key], regression[key], strict=True)]
        better = f"{sum(a < b for a, b in pairs)} of {len(pairs)}"
        rows.append(
            {
                "": name,
                **{label: f"{mean(found[key]):.3f}" for key, label in KEYS.items()},
                "better than regression": better if variant else "",
                "largest NMSE on the way": f"{found['largest']:.2f}" if variant else "",
                "sparse model's stream": f"{found['length']:.1f}",
                "sparse model's loss": f"{found['lm']:.2f}",
            }
        )
        say(f"  {rows[-1]}")
    head = (
        "Sparse model and bridges start from ridge regression and are trained together for "
        f"{steps} steps of {BRIDGE_BATCH_SIZE * BLOCK_SIZE:,} tokens, each time with one thing "
        "done otherwise; one run each. NMSE (of encoding and decoding; on the way, their sum) and "
        f"KL as in bridges.md, means over the five locations, on {N_TEXT * BLOCK_SIZE:,} "
        "validation tokens; how many of the twenty figures are better than regression's; the "
        "standard deviation over tokens of the sparse model's stream after its last block."
    )
    return "\n\n".join(["# Training bridges: what matters", machine(), head, table(rows)])


if __name__ == "__main__":
    Experiment.main(run, __doc__, "bridge_ablation", str(FOLDER), steps=100)
