"""AdamW, SGD, top-k annealed AdamW and random coordinate descent on three architectures.

CircuitGPT, the GPT-2 small architecture and the TinyLlama architecture, narrower and shallower than
the originals, on the standard library: the same data, order and number of tokens for all. Every run
is a process of its own, so that its peak memory is its own.
"""

import copy
import math
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hf_circuit_sparsity.modeling.configuration_circuitgpt import CircuitGPTConfig
from hf_circuit_sparsity.modeling.modeling_circuitgpt import CircuitGPTForCausalLM
from hf_circuit_sparsity.modeling.sparse_layers import to_sparse

from ..experiment import Experiment, in_new_process, machine, peak_memory, stored, table
from .rcd_race import Run, Training, spread, tokens

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
    # The floor that was the default when the tables were measured.
    "MB-RCD": ("rcd", RATES, {"selection": "magnitude", "magnitude_floor": 0.1, **_BLOCK}),
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


def measure(
    folder: Path, architecture: str, method: str, lr: float, options: SimpleNamespace
) -> dict[str, Any]:
    """One training in this process: what the table says about it."""
    o = options
    data = tokens(folder, o.vocabulary, CONTEXT)
    held_out = spread(data["validation"], 128)
    before = peak_memory()
    kind, _, settings = METHODS[method]
    build = builder(architecture, o.width, o.layers, o.vocabulary)
    plan = Run(kind, o.steps, lr, o.batch, settings)
    training = Training(build, plan, 1 / o.inverse_density, data["train"], held_out)
    training.run(o.steps)
    peak = peak_memory() - before
    loss = training.evaluate()
    training.close()
    nonzeros, entries = training.nonzeros()
    model = copy.deepcopy(training.model).eval()
    if nonzeros < entries / 8:
        to_sparse(model)
    return {
        "lr": lr,
        "loss": loss,
        "density": nonzeros / entries,
        "step_cpu_ms": 1e3 * training.cpu_seconds / o.steps,
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


def run(experiment: Experiment) -> str:
    """Train what is not stored yet; one table per architecture."""
    o, folder = experiment.options, experiment.folder
    tokens(folder, o.vocabulary, CONTEXT)
    parts = [
        "# Optimizers compared",
        machine(),
        f"{o.steps} steps of {o.batch} sequences of {CONTEXT} tokens "
        f"({o.steps * o.batch * CONTEXT:,} tokens) of the standard library, vocabulary "
        f"{o.vocabulary}, {o.layers} layers of width {o.width}; sparse runs end with one "
        f"of {o.inverse_density} weights. One seed; of the learning rates "
        "tried each optimizer's best, the other losses in brackets, by rising rate. Step times are "
        "CPU time per step; peak memory is what training added to that of the process; inference "
        "is a forward pass of 256 tokens per CPU second, on the nonzeros where there are few.",
    ]
    for architecture in o.architectures:
        rows = []
        for method, (_, rates, _) in METHODS.items():
            tried = []
            for lr in rates:
                file = folder / "measured" / architecture / method / f"{lr:g}.json"
                args = (folder, architecture, method, lr, o)
                tried.append(stored(file, lambda args=args: in_new_process(measure, *args)))
            best = min(tried, key=_by_loss)
            others = ", ".join(f"{r['loss']:.3f}" for r in tried if r is not best)
            rows.append(
                {
                    "optimizer": method,
                    "learning rate": f"{best['lr']:g}",
                    "validation loss": f"{best['loss']:.3f} ({others})",
                    "perplexity": f"{math.exp(min(best['loss'], 50)):.1f}",
                    "density": f"{best['density']:.4f}",
                    "ms per step": f"{best['step_cpu_ms']:.0f}",
                    "peak memory (MB)": f"{best['peak_mb']:.0f}",
                    "inference (tokens/s)": f"{best['tokens_per_second']:,.0f}",
                }
            )
        parts += [
            f"## {LABELS[architecture]}, {best['parameters']:,} parameters (the original: "
            f"{FULL_SIZE[architecture]})",
            table(rows),
        ]
    return "\n\n".join(parts)


def _by_loss(run: dict[str, Any]) -> tuple[bool, float]:
    """Diverged runs last: NaN is neither below nor above anything."""
    return math.isnan(run["loss"]), run["loss"]


if __name__ == "__main__":
    Experiment.main(
        run, __doc__, "optimizer_comparison", "runs/optimizer_comparison", width=192, layers=3,
        steps=200, batch=8, vocabulary=2048, inverse_density=24, architectures=ARCHITECTURES,
    )  # fmt: skip
