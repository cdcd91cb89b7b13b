"""How the speed benchmarks measure: both sides in one process, on the same inputs, in turn."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..experiment import Experiment, machine


@dataclass(frozen=True)
class Timing:
    """Seconds that one call took, over several."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def divided(self, calls: int) -> "Timing":
        """Of one of so many that one call held."""
        return Timing(tuple(s / calls for s in self.seconds))

    def __str__(self) -> str:
        """Median and range, in milliseconds."""
        low, high = min(self.seconds), max(self.seconds)
        return f"{_ms(self.median)} ({_ms(low)}–{_ms(high)})"


def interleaved(
    sides: dict[str, Callable[[], object]], rounds: int, device: str = "cpu", calls: int = 1
) -> dict[str, Timing]:
    """Call every side once per round, in turn, so that all meet the same disturbances.

    One round before is not counted. On CUDA a call ends when the device has finished; of several
    `calls` in a row, which the device takes without a pause, each has the same share.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for round_ in range(-1, rounds):
        for name, call in sides.items():
            start = now(device)
            for _ in range(calls):
                call()
            took = (now(device) - start) / calls
            if round_ >= 0:
                seconds[name].append(took)
    return {name: Timing(tuple(s)) for name, s in seconds.items()}


def now(device: str) -> float:
    """Seconds, when the device has finished what it was given."""
    if device != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}" if seconds < 1 else f"{1e3 * seconds:.0f}"


def ratio(slow: Timing, fast: Timing) -> str:
    """How many times as fast, by the medians."""
    return f"{slow.median / fast.median:.1f} ×"


def settings(experiment: Experiment) -> tuple[str, torch.dtype, bool]:
    """Device, dtype of weights and activations, and whether to take small sizes."""
    options = experiment.options
    return options.device, getattr(torch, options.dtype), options.quick


def main(
    run: Callable[[Experiment], str], description: str | None, name: str, **options: Any
) -> None:
    """The command line of one benchmark, which may have options of its own."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None

    def on_this_machine(experiment: Experiment) -> str:
        title = f"# Benchmark: {experiment.name}"
        return "\n\n".join([title, machine(experiment.options.device), run(experiment)])

    folder = "runs/benchmark"
    Experiment.main(
        on_this_machine, description, name, folder, folder,
        device=str(found or "cpu"), dtype="float32", quick=False, **options,
    )  # fmt: skip
