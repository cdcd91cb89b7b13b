"""Runs all benchmarks and writes what they print into one report."""

import argparse
import time
from pathlib import Path

import torch
from transformers.utils import logging

from hf_circuit_sparsity.commands.console import say

from . import abs_topk, projection, sparse_checkpoint, sparse_execution, training_step, width
from .measure import machine

SECTIONS = (
    ("Exact top-k projection", projection),
    ("AbsTopK", abs_topk),
    ("Sparse execution", sparse_execution),
    ("Time against width", width),
    ("Training step", training_step),
    ("Sparse checkpoints", sparse_checkpoint),
)


def run_benchmark(
    output: str | Path,
    quick: bool = False,
    device: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Run every benchmark, one after the other, and write a Markdown report.

    Args:
        output: the report's path; the plot is written beside it, as `width.png`.
        quick: small sizes that take seconds, to see that all runs; the figures mean little.
        device: the accelerator if there is one, else the CPU.
        dtype: of weights and activations.

    Returns:
        The report's path.

    Raises:
        ValueError: `output` is a folder.
    """
    output = Path(output)
    if output.is_dir():
        raise ValueError(f"{output} is a folder; pass the path of a Markdown file to write.")
    output.parent.mkdir(parents=True, exist_ok=True)
    if device is None:
        found = torch.accelerator.is_available()
        device = str(torch.accelerator.current_accelerator()) if found else "cpu"
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    parts = ["# Benchmarks", machine(device)]
    if quick:
        parts.append("Small sizes (`--quick`): these figures only show that everything runs.")
    try:
        for title, module in SECTIONS:
            say(f"{title} ...")
            start = time.perf_counter()
            options = {"picture": output.with_name("width.png")} if module is width else {}
            text = module.run(device, dtype, quick, **options)
            took = time.perf_counter() - start
            parts += [f"## {title}", f"{module.__doc__} ({took:.0f} s)", text]
    finally:
        if bars:
            logging.enable_progress_bar()
    partial = output.with_name(f"{output.name}.partial")
    partial.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    partial.replace(output)
    say(f"Written to {output}")
    return output


def main() -> None:
    parser = argparse.ArgumentParser(description="Run every speed benchmark and write one report.")
    parser.add_argument("--output", default="benchmark.md", help="(default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that all runs")
    parser.add_argument("--device", help="(default: the accelerator if there is one, else the CPU)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    args = parser.parse_args()
    run_benchmark(args.output, args.quick, args.device, getattr(torch, args.dtype))


if __name__ == "__main__":
    main()
