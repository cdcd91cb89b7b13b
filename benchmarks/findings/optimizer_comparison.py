"""AdamW, SGD, top-k annealed AdamW and random coordinate descent on three architectures.

CircuitGPT, the GPT-2 small architecture and the TinyLlama architecture, narrower and shallower than
the originals, on the standard library: the same data, order and number of tokens for all. Every run
is a process of its own, so that its peak memory is its own.
"""

import argparse
import copy
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.utils import logging

from hf_circuit_sparsity.modeling.configuration_circuitgpt import CircuitGPTConfig
from hf_circuit_sparsity.modeling.modeling_circuitgpt import CircuitGPTForCausalLM
from hf_circuit_sparsity.modeling.sparse_layers import to_sparse

from ..speed.measure import machine, peak_memory, table, write_text
from .rcd_headline import tokens
from .rcd_race import Recipe, Training

CONTEXT = 128
ARCHITECTURES = ("circuitgpt", "gpt2", "tinyllama")
_BLOCK = {"block_fraction": 1 / 4, "block_steps": 2, "start_density": 1 / 8}
RATES = (1e-3, 3e-3, 1e-2)
# Kind, learning rates tried, settings.
METHODS: dict[str, tuple[str, tuple[float, ...], dict[str, Any]]] = {
    "AdamW, dense": ("adamw", RATES, {"betas": (0.9, 0.95)}),
    "SGD, dense": ("sgd", (0.1, 0.3, 1.0), {"momentum": 0.9}),
    "top-k annealed AdamW": ("topk", RATES, {}),
    "RCD, uniform": ("rcd", RATES, {"selection": "uniform", **_BLOCK}),
    "MB-RCD": ("rcd", RATES, {"selection": "magnitude", **_BLOCK}),
    "RCD, Gauss-Southwell on the block": ("rcd", RATES, {
        "selection": "gradient", "greedy_fraction": 1 / 4, **_BLOCK}),
}  # fmt: skip
LABELS = {
    "circuitgpt": "CircuitGPT",
    "gpt2": "GPT-2 small architecture",
    "tinyllama": "TinyLlama architecture",
}
FULL_SIZE = {
    "circuitgpt": "8 layers, d_model 2048 in the paper",
    "gpt2": "12 layers, width 768, 50257 tokens",
    "tinyllama": "22 layers, width 2048, MLP 5632, 32 heads on 4 keys, 32000 tokens",
}


def builder(name: str, width: int, layers: int, vocabulary: int) -> Callable[[], PreTrainedModel]:
    """What makes the model; the proportions are the originals'."""
    if name == "circuitgpt":
        config = CircuitGPTConfig(
            n_layer=layers, d_model=width, d_head=16, block_size=CONTEXT, vocab_size=vocabulary
        )
        return lambda: CircuitGPTForCausalLM(config)
    if name == "gpt2":
        gpt2 = GPT2Config(
            n_layer=layers, n_embd=width, n_head=max(1, width // 64), n_positions=CONTEXT,
            vocab_size=vocabulary, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
            bos_token_id=vocabulary - 1, eos_token_id=vocabulary - 1,
        )  # fmt: skip
        return lambda: GPT2LMHeadModel(gpt2)
    llama = LlamaConfig(
        num_hidden_layers=layers, hidden_size=width, intermediate_size=width * 11 // 4,
        num_attention_heads=8, num_key_value_heads=1, max_position_embeddings=CONTEXT,
        vocab_size=vocabulary, bos_token_id=vocabulary - 1, eos_token_id=vocabulary - 1,
    )  # fmt: skip
    return lambda: LlamaForCausalLM(llama)


def run_one(args: argparse.Namespace) -> dict[str, Any]:
    """One training in this process: what the table says about it."""
    logging.set_verbosity_error()
    data = tokens(args.folder, args.vocabulary, CONTEXT)
    held_out = torch.from_numpy(data["validation"])
    held_out = held_out[:: max(1, len(held_out) // 128)][:128]
    before = peak_memory()
    kind, _, settings = METHODS[args.method]
    recipe = Recipe(kind, args.steps, args.lr, args.batch, settings)
    training = Training(
        builder(args.architecture, args.width, args.layers, args.vocabulary),
        recipe,
        1 / args.inverse_density,
        torch.from_numpy(data["train"]),
        held_out,
    )
    while not training.finished:
        training.run(args.steps)
    peak = peak_memory() - before
    loss = training.evaluate()
    training.close()
    nonzeros, entries = training.nonzeros()
    model = copy.deepcopy(training.model).eval()
    if nonzeros < entries / 8:
        to_sparse(model)
    return {
        "architecture": args.architecture,
        "method": args.method,
        "lr": args.lr,
        "loss": loss,
        "density": nonzeros / entries,
        "step_ms": 1e3 * training.seconds / args.steps,
        "step_cpu_ms": 1e3 * training.cpu_seconds / args.steps,
        "peak_mb": peak / 1024**2,
        "tokens_per_second": _speed(model, held_out[:2]),
        "parameters": training.model.num_parameters(),
    }


@torch.no_grad()
def _speed(model: PreTrainedModel, ids: torch.Tensor) -> float:
    """Tokens per CPU second of a forward pass, the best of five."""
    best = math.inf
    for _ in range(6):
        start = time.process_time()
        model(ids, use_cache=False)
        best = min(best, time.process_time() - start)
    return ids.numel() / best


def report(results: list[dict[str, Any]], args: argparse.Namespace) -> str:
    """One table per architecture."""
    parts = [
        "# Optimizers compared",
        machine("cpu"),
        f"{args.steps} steps of {args.batch} sequences of {CONTEXT} tokens "
        f"({args.steps * args.batch * CONTEXT:,} tokens) of the standard library, vocabulary "
        f"{args.vocabulary}, {args.layers} layers of width {args.width}; sparse runs end with one "
        f"of {args.inverse_density} weights. One seed; of the learning rates "
        "tried each optimizer's best, the other losses in brackets, by rising rate. Step times are "
        "CPU time per step; peak memory is what training added to that of the process; inference "
        "is a forward pass of 256 tokens per CPU second, on the nonzeros where there are few.",
    ]
    for name in ARCHITECTURES:
        tried = [r for r in results if r["architecture"] == name]
        if not tried:
            continue
        by_method = {m: [r for r in tried if r["method"] == m] for m in METHODS}
        own = [min(runs, key=_by_loss) for runs in by_method.values() if runs]
        rows = [
            (r["method"], f"{r['lr']:g}", _losses(r, by_method[r["method"]]),
             f"{math.exp(min(r['loss'], 50)):.1f}", f"{r['density']:.4f}",
             f"{r['step_cpu_ms']:.0f}", f"{r['peak_mb']:.0f}", f"{r['tokens_per_second']:,.0f}")
            for r in own
        ]  # fmt: skip
        header = ("optimizer", "learning rate", "validation loss", "perplexity", "density",
                  "ms per step", "peak memory (MB)", "inference (tokens/s)")  # fmt: skip
        title = (
            f"{LABELS[name]}, {own[0]['parameters']:,} parameters (the original: {FULL_SIZE[name]})"
        )
        parts += [f"## {title}", table(header, rows)]
    return "\n\n".join(parts) + "\n"


def _by_loss(run: dict[str, Any]) -> tuple[bool, float]:
    """Diverged runs last: NaN is neither below nor above anything."""
    return math.isnan(run["loss"]), run["loss"]


def _losses(best: dict[str, Any], runs: list[dict[str, Any]]) -> str:
    others = ", ".join(f"{r['loss']:.3f}" for r in runs if r is not best)
    return f"{best['loss']:.3f} ({others})" if others else f"{best['loss']:.3f}"


def main() -> None:
    """The command line. Runs that are in the folder already are not repeated."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="for the data, results and table")
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--inverse-density", type=int, default=24)
    parser.add_argument(
        "--architectures", nargs="*", choices=ARCHITECTURES, default=list(ARCHITECTURES)
    )
    parser.add_argument("--architecture", choices=ARCHITECTURES, help=argparse.SUPPRESS)
    parser.add_argument("--method", choices=METHODS, help=argparse.SUPPRESS)
    parser.add_argument("--lr", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.method:
        print(json.dumps(run_one(args)))
        return
    file = args.folder / "optimizer_comparison.json"
    results = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    tokens(args.folder, args.vocabulary, CONTEXT)
    done = {(r["architecture"], r["method"], r["lr"]) for r in results}
    for architecture, method in product(args.architectures, METHODS):
        for lr in METHODS[method][1]:
            if (architecture, method, lr) in done:
                continue
            command = [sys.executable, "-m", __spec__.name, *sys.argv[1:], "--architecture",
                       architecture, "--method", method, "--lr", str(lr)]  # fmt: skip
            out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            results.append(json.loads(out.splitlines()[-1]))
            print(results[-1], flush=True)
            write_text(file, json.dumps(results, indent=1) + "\n")
    text = report(results, args)
    write_text(args.folder / "optimizer_comparison.md", text)
    print(text)


if __name__ == "__main__":
    main()
