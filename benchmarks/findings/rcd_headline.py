"""Wall-clock time in which random coordinate descent reaches what top-k annealed AdamW ends with.

CircuitGPT with d_model 1024 and 4 layers, 1 of 64 weights nonzero, on the standard library. Beside
one long top-k run there are runs of random coordinate descent, planned to take about a third of its
time and about as long, and a top-k run of a third of the steps. All take turns in one process.
Interrupted, it goes on where it was.
"""

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from datasets.utils.logging import disable_progress_bar

from hf_circuit_sparsity.modeling.configuration_circuitgpt import CircuitGPTConfig
from hf_circuit_sparsity.modeling.modeling_circuitgpt import CircuitGPTForCausalLM
from hf_circuit_sparsity.optim.sparse_init import sparse_from_config
from hf_circuit_sparsity.tasks.corpus import build_corpus
from hf_circuit_sparsity.tasks.packing import pack_dataset
from hf_circuit_sparsity.tasks.tokenizer import train_tokenizer
from hf_circuit_sparsity.trainer.bigram_init import initialize_bigram_table_

from ..speed.measure import machine, save_figure, table, write_text
from .rcd_race import Recipe, Training, bigram_loss, race, seconds_to

DENSITY = 1 / 64
TOPK = {"anneal_start": 0.01, "anneal_end": 0.5}
RCD = {
    "selection": "gradient",
    "greedy_fraction": 1 / 4,
    "block_fraction": 1 / 16,
    "block_steps": 1,
}


def recipes(args: argparse.Namespace) -> dict[str, Recipe]:
    """The trainings by name, in the order of the tables."""

    def topk(steps: int) -> Recipe:
        return Recipe("topk", steps, args.topk_lr, args.batch, TOPK, args.seed)

    found = {"topk": topk(args.topk_steps)}
    for steps in args.rcd_steps:
        found[f"rcd-{steps}"] = Recipe("rcd", steps, args.rcd_lr, args.batch, RCD, args.seed)
    for steps in args.short_topk_steps:
        found[f"topk-{steps}"] = topk(steps)
    return found


def tokens(folder: Path, vocabulary: int, context: int) -> dict[str, np.ndarray]:
    """Packed blocks of the standard library, `(n, context)`, made once per folder."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        name: folder / f"{name}-{vocabulary}-{context}.npy" for name in ("train", "validation")
    }
    if not all(file.is_file() for file in files.values()):
        corpus = build_corpus()
        tokenizer = train_tokenizer(corpus["train"], vocab_size=vocabulary)
        for name, file in files.items():
            blocks = np.array(
                pack_dataset(corpus[name], tokenizer, context)["input_ids"], dtype=np.int16
            )
            partial = file.with_suffix(".partial.npy")
            np.save(partial, blocks)
            os.replace(partial, file)
    return {name: np.load(file).astype(np.int64) for name, file in files.items()}


def builders(
    config: CircuitGPTConfig, counted: torch.Tensor | None, seed: int = 0
) -> tuple[Callable[[], CircuitGPTForCausalLM], Callable[[float], CircuitGPTForCausalLM]]:
    """What :class:`Training` builds a dense and a sparse model with.

    Args:
        counted: tokens whose bigram counts both begin with; None to begin without.
        seed: of the sparse one.
    """

    def begun(model: CircuitGPTForCausalLM) -> CircuitGPTForCausalLM:
        if counted is not None:
            initialize_bigram_table_(model, counted)
        return model

    return (
        lambda: begun(CircuitGPTForCausalLM(config)),
        lambda density: begun(sparse_from_config(config, density, seed=seed)),
    )


def report(
    trainings: dict[str, Training], bigram: float, folder: Path, args: argparse.Namespace
) -> str:
    """Write `rcd_headline.json`, `.png` and `.md` into the folder; returns the Markdown."""
    goal = trainings["topk"].curve[-1]
    rows, reached = [], {}
    for name, training in trainings.items():
        last = training.curve[-1]
        when = {c: seconds_to(training.curve, goal["loss"], c) for c in ("seconds", "cpu_seconds")}
        reached[name] = when
        shown = ["not reached"] * 2
        if when["seconds"] is not None:
            shown = [f"{when[c]:.0f} s ({when[c] / goal[c]:.2f})" for c in when]
        rows.append(
            (name, training.recipe.steps, f"{last['tokens']:,}", f"{last['loss']:.4f}",
             f"{training.nonzeros()[0]:,}", f"{1e3 * last['seconds'] / training.done:.0f}",
             f"{last['seconds']:.0f}", f"{last['cpu_seconds']:.0f}", *shown)
        )  # fmt: skip
    header = ("run", "steps", "tokens", "validation loss", "nonzeros", "ms per step", "seconds",
              "CPU seconds", "reaches topk's loss after (share of its time)",
              "the same in CPU seconds")  # fmt: skip
    text = (
        f"# Time to the loss of top-k annealed AdamW\n\n{machine('cpu')}\n\n"
        f"CircuitGPT, d_model {args.d_model}, {args.layers} layers, density 1/64, vocabulary "
        f"{args.vocabulary}, context {args.context}, {args.batch} sequences per step; "
        f"validation on {args.held_out} sequences. The bigram table alone "
        f"(counts of the whole training text, smoothed): {bigram:.4f}. "
        + ("All begin with these counts. " if args.start_at_bigrams else "")
        + f"Seed {args.seed}. Runs took turns; a clock counts training only.\n\n"
        + table(header, rows)
        + f"\n\ntopk: lr {args.topk_lr}, {TOPK}\n\nrcd: lr {args.rcd_lr}, {RCD}\n\n"
        "![Loss against time and tokens](rcd_headline.png)\n"
    )
    content = {
        "arguments": {k: v for k, v in vars(args).items() if k != "folder"},
        "bigram_loss": bigram,
        "topk": TOPK,
        "rcd": RCD,
        "reached": reached,
        "curves": {name: t.curve for name, t in trainings.items()},
    }
    write_text(folder / "rcd_headline.json", json.dumps(content, indent=1) + "\n")
    write_text(folder / "rcd_headline.md", text)
    _draw({name: t.curve for name, t in trainings.items()}, bigram, folder / "rcd_headline.png")
    return text


def _draw(curves: dict[str, list[dict[str, float]]], bigram: float, path: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        print("The plot needs matplotlib: pip install 'hf-circuit-sparsity[viz]'.")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(10, 4), layout="constrained", sharey=True
    )
    figure.set_layout_engine("constrained")
    goal = curves["topk"][-1]["loss"]
    colors = {"topk": ("C3", "C1"), "rcd": ("C0", "C2", "C4")}
    used: dict[str, int] = {}
    for name, curve in curves.items():
        kind = name.split("-")[0]
        color = colors[kind][used.get(kind, 0) % len(colors[kind])]
        used[kind] = used.get(kind, 0) + 1
        losses = [point["loss"] for point in curve]
        left.plot([point["seconds"] / 60 for point in curve], losses, color=color, label=name)
        right.plot([point["tokens"] / 1e6 for point in curve], losses, color=color, label=name)
    every = [point["loss"] for curve in curves.values() for point in curve]
    lowest, top = min(every), min(max(every) + 0.1, min(every) + 1.7)
    for axes, label in ((left, "minutes"), (right, "million tokens")):
        axes.axhline(goal, color="C3", linestyle=":", linewidth=1, label="where topk ends")
        axes.axhline(bigram, color="0.5", linestyle="--", linewidth=1, label="bigram table alone")
        axes.set(xlabel=label, ylim=(lowest - 0.1, top))
    left.set(ylabel="validation loss (nats per token)", title="against wall-clock time")
    right.set(title="against tokens")
    right.legend()
    save_figure(figure, path)
    pyplot.close(figure)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="for states, curves, table and picture")
    parser.add_argument("--d-model", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--vocabulary", type=int, default=512)
    parser.add_argument("--held-out", type=int, default=128)
    parser.add_argument("--topk-steps", type=int, default=600)
    parser.add_argument("--rcd-steps", type=int, nargs="*", default=[300, 450])
    parser.add_argument("--short-topk-steps", type=int, nargs="*", default=[])
    parser.add_argument("--topk-lr", type=float, default=1e-3)
    parser.add_argument("--rcd-lr", type=float, default=1e-3)
    parser.add_argument(
        "--start-at-bigrams", action="store_true", help="begin all with the bigram counts"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--turn", type=float, default=60, help="seconds")
    parser.add_argument("--evaluations", type=int, default=25)
    args = parser.parse_args()
    disable_progress_bar()
    data = tokens(args.folder, args.vocabulary, args.context)
    bigram, smoothing = bigram_loss(data["train"], data["validation"], args.vocabulary)
    print(f"bigram table alone: {bigram:.4f} (smoothing {smoothing:g})", flush=True)
    # Spread over the files: neighbouring blocks come from the same one.
    every = max(1, len(data["validation"]) // args.held_out)
    held_out = torch.from_numpy(data["validation"][::every][: args.held_out])
    config = CircuitGPTConfig(
        n_layer=args.layers, d_model=args.d_model, d_head=16, block_size=args.context,
        vocab_size=args.vocabulary,
    )  # fmt: skip
    blocks = torch.from_numpy(data["train"])

    build, build_sparse = builders(config, blocks if args.start_at_bigrams else None, args.seed)
    trainings = {
        name: Training(build, recipe, DENSITY, blocks, held_out, build_sparse)
        for name, recipe in recipes(args).items()
    }
    race(trainings, args.folder, args.turn, args.evaluations, lambda t: print(t, flush=True))
    print("\n" + report(trainings, bigram, args.folder, args))


if __name__ == "__main__":
    main()
