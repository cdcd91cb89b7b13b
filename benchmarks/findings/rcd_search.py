"""A search over settings of random coordinate descent, and of top-k beside it, on a small model.

Reads runs from standard input, one per line, as `rcd steps=1200 lr=0.01 selection=gradient
block_fraction=1/4` or `topk lr=0.02`: the method, then steps, batch, lr, and settings of the
optimizer. Every result is appended to a file, from which the table is made.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from hf_circuit_sparsity.modeling.configuration_circuitgpt import CircuitGPTConfig

from ..speed.measure import machine, table, write_text
from .rcd_headline import builders, tokens
from .rcd_race import Recipe, Training

CONTEXT = 128


def parse(line: str) -> Recipe:
    """A run from its line.

    Raises:
        ValueError: the line does not begin with a method, or a part is not `name=value`.
    """
    method, *parts = line.split()
    if method not in ("topk", "rcd"):
        raise ValueError(f"the line {line!r} does not begin with topk or rcd: name the method.")
    settings: dict[str, Any] = {}
    for part in parts:
        name, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"{part!r} in {line!r} is not name=value: write for example lr=0.01.")
        settings[name] = _value(value)
    return Recipe(
        method,
        settings.pop("steps", 300),
        settings.pop("lr", 1e-2),
        settings.pop("batch", 4),
        settings,
    )


def _value(text: str) -> int | float | str:
    for kind in (int, float, lambda t: float(Fraction(t))):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def report(results: Iterable[dict[str, Any]], args: argparse.Namespace) -> str:
    """The table, best last within the runs of equal length."""
    rows = [
        (r["line"], r["steps"], f"{r['quarters'][1]:.3f}", f"{r['loss']:.3f}", f"{r['cpu_ms']:.0f}")
        for r in sorted(results, key=lambda r: (r["steps"], -r["loss"]))
    ]
    header = ("run", "steps", "validation loss at half", "at the end", "CPU ms per step")
    return (
        f"# Settings tried\n\nCircuitGPT, d_model {args.d_model}, {args.layers} layers, vocabulary "
        f"{args.vocabulary}, context {CONTEXT}, density 1/{args.share} at the end; 96 validation "
        "sequences; one seed."
        + (" All begin with the bigram counts." if args.start_at_bigrams else "")
        + "\n\n"
        + table(header, rows)
        + "\n"
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="for the data, results and table")
    parser.add_argument("--d-model", type=int, default=192)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=512)
    parser.add_argument("--share", type=int, default=24, help="one weight of so many is nonzero")
    parser.add_argument(
        "--start-at-bigrams", action="store_true", help="begin all with the bigram counts"
    )
    args = parser.parse_args()
    runs = [(line.strip(), parse(line)) for line in sys.stdin if line.strip()]
    data = tokens(args.folder, args.vocabulary, CONTEXT)
    held_out = torch.from_numpy(data["validation"])
    held_out = held_out[:: max(1, len(held_out) // 96)][:96]
    config = CircuitGPTConfig(
        n_layer=args.layers, d_model=args.d_model, d_head=16, block_size=CONTEXT,
        vocab_size=args.vocabulary,
    )  # fmt: skip
    blocks = torch.from_numpy(data["train"])
    build, build_sparse = builders(config, blocks if args.start_at_bigrams else None)

    print(machine("cpu"), flush=True)
    file = args.folder / "rcd_search.jsonl"
    for line, recipe in runs:
        training = Training(build, recipe, 1 / args.share, blocks, held_out, build_sparse)
        while not training.finished:
            training.run(max(1, recipe.steps // 4))
            training.evaluate()
        training.close()
        found = {
            "line": line,
            "steps": recipe.steps,
            "quarters": [point["loss"] for point in training.curve],
            "loss": training.curve[-1]["loss"],
            "cpu_ms": 1e3 * training.cpu_seconds / recipe.steps,
        }
        with file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(found) + "\n")
        print(f"{found['loss']:.4f}  {line}", flush=True)
    results = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    text = report(results, args)
    write_text(args.folder / "rcd_search.md", text)
    print("\n" + text)


if __name__ == "__main__":
    main()
