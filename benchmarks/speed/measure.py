"""How every benchmark measures and prints."""

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from hf_circuit_sparsity.kernels.cpu import load_kernels


@dataclass(frozen=True)
class Timing:
    """Seconds that one call took, over several."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def __str__(self) -> str:
        """Median and range, in milliseconds."""
        low, high = min(self.seconds), max(self.seconds)
        return f"{_ms(self.median)} ({_ms(low)}–{_ms(high)})"


def interleaved(
    sides: dict[str, Callable[[], object]], rounds: int, device: str = "cpu"
) -> dict[str, Timing]:
    """Call every side once per round, in turn, so that all meet the same disturbances.

    One round before is not counted. On CUDA a call ends when the device has finished.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for round_ in range(-1, rounds):
        for name, call in sides.items():
            _wait(device)
            start = time.perf_counter()
            call()
            _wait(device)
            if round_ >= 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: Timing(tuple(s)) for name, s in seconds.items()}


def _wait(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}" if seconds < 1 else f"{1e3 * seconds:.0f}"


def ratio(slow: Timing, fast: Timing) -> str:
    """How many times as fast, by the medians."""
    return f"{slow.median / fast.median:.1f} ×"


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def peak_memory() -> int:
    """Bytes of memory that this process has had at most.

    Where the system says so (Linux), of this program alone: what `getrusage` counts is inherited
    from the process that started it.
    """
    try:
        with open("/proc/self/status", encoding="utf-8") as status:
            return next(1024 * int(x.split()[1]) for x in status if x.startswith("VmHWM"))
    except (OSError, StopIteration):
        import resource

        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def write_text(path: Path, text: str) -> None:
    """Write a file beside its place and move it there; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def save_figure(figure: Any, path: Path, dpi: int = 150) -> None:
    """The same for a figure, as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    figure.savefig(partial, dpi=dpi, format="png")
    partial.replace(path)


def machine(device: str) -> str:
    """What the figures were measured on, in one line."""
    kernels = "with" if load_kernels() else "without"
    chip = torch.cuda.get_device_name() if device.startswith("cuda") else _processor()
    return (
        f"{chip}, {torch.get_num_threads()} CPU thread(s), torch {torch.__version__}, "
        f"transformers {transformers.__version__}, numpy {np.__version__}, {kernels} "
        "compiled CPU kernels"
    )


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = {line.split(":")[1].strip() for line in file if line.startswith("model name")}
    except OSError:
        names = set()
    return ", ".join(sorted(names)) or platform.processor() or platform.machine()


def main(description: str, run: Callable[..., str]) -> None:
    """The command line of one benchmark: prints what `run(device, dtype, quick)` returns."""
    parser = argparse.ArgumentParser(description=description)
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    parser.add_argument("--device", default=str(found or "cpu"), help="(default: %(default)s)")
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16"), help="(%(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, in seconds")
    args = parser.parse_args()
    print(machine(args.device), end="\n\n")
    print(run(args.device, getattr(torch, args.dtype), args.quick))
