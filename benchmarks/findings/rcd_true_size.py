"""What a step costs at the sizes of GPT-2 small and of TinyLlama, by random coordinate descent on
nonzeros, AdamW, SGD and top-k annealed AdamW.

Every side is a process of its own, which makes the model of transformers with random weights and
takes a few steps of 1,024 tokens, in pieces whose gradients add up. The peak is what the process
grew by. What does not fit is computed from the number of parameters, and marked as such.
"""

import statistics
import time
from contextlib import nullcontext

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from hf_circuit_sparsity.optim.param_groups import sparse_param_groups
from hf_circuit_sparsity.optim.rcd.optimizer import RCDSparseOptimizer
from hf_circuit_sparsity.optim.rcd.partial_gradients import PartialGradients
from hf_circuit_sparsity.optim.sparse_init import sparse_from_config
from hf_circuit_sparsity.optim.topk_adamw import TopKAdamW

from ..experiment import Experiment, in_new_process, machine, peak_memory, stored, table

DENSITY = 1 / 64
TOKENS = 1024
RCD, ADAMW, SGD, TOPK = "RCD, nonzeros alone", "AdamW", "SGD", "top-k AdamW"
# Copies of the parameters in float32: weights, gradients and what the optimizer remembers.
COPIES = {ADAMW: 4, SGD: 2, TOPK: 4}
MODELS = {
    "GPT-2 small": {"model_type": "gpt2", "vocab_size": 50257},
    "TinyLlama": {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    },
}


def config_of(model: str) -> PreTrainedConfig:
    """The config of one of `MODELS`."""
    fields = dict(MODELS[model])
    return AutoConfig.for_model(fields.pop("model_type"), **fields)


def parameters_of(model: str) -> int:
    """Weights of the dense model."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config_of(model)).num_parameters()


def cost(model: str, side: str, piece: int, steps: int, threads: int) -> dict[str, float]:
    """Seconds to make the model and of a step (median), and bytes that the process grew by."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    before, started = peak_memory(), time.perf_counter()
    config = config_of(model)
    if side == RCD:
        made = sparse_from_config(config, DENSITY)
    else:
        made = AutoModelForCausalLM.from_config(config)
    born = time.perf_counter() - started
    optimizer = {
        RCD: lambda: RCDSparseOptimizer(
            sparse_param_groups(made), lr=1e-3, target_density=DENSITY, selection="gradient",
            block_fraction=1 / 64, block_steps=2,
        ),
        ADAMW: lambda: torch.optim.AdamW(made.parameters(), lr=1e-4, fused=True),
        SGD: lambda: torch.optim.SGD(made.parameters(), lr=1e-2),
        TOPK: lambda: TopKAdamW(
            sparse_param_groups(made), lr=1e-4, target_density=DENSITY, anneal_start=0.0,
            anneal_end=0.0,
        ),
    }[side]()  # fmt: skip
    seconds, pieces = [], TOKENS // piece
    with PartialGradients(made, optimizer) if side == RCD else nullcontext():
        for _ in range(steps + 1):
            started = time.perf_counter()
            for batch in torch.randint(config.vocab_size, (pieces, 1, piece)):
                (made(batch, labels=batch, use_cache=False).loss / pieces).backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds.append(time.perf_counter() - started)
    return {
        "born": born,
        "seconds": statistics.median(seconds[1:]),
        "peak": peak_memory() - before,
    }


def run(experiment: Experiment) -> str:
    """The table; measures what is not there yet."""
    o = experiment.options
    rows = []
    for model in o.models:
        parameters = parameters_of(model)
        for side in (RCD, ADAMW, SGD, TOPK):
            row = {"model": model, "parameters": f"{parameters:,}", "side": side}
            path = experiment.folder / f"{model} {side}.json"
            fits = side == RCD or 4e-9 * COPIES[side] * parameters < o.most_gb
            if path.is_file() or (fits and not experiment.stored_only):
                arguments = (model, side, o.piece, o.steps, o.threads)
                found = stored(path, lambda a=arguments: in_new_process(cost, *a))
                row |= {
                    "peak (GB)": f"{found['peak'] / 1e9:.2f}",
                    "s per 1,024 tokens": f"{found['seconds']:.1f}",
                    "tokens/s": f"{TOKENS / found['seconds']:.0f}",
                    "s to make it": f"{found['born']:.0f}",
                }
            else:
                least = 4e-9 * COPIES.get(side, 0) * parameters
                row["peak (GB)"] = f"at least {least:.1f} (computed)" if least else ""
                row |= dict.fromkeys(("s per 1,024 tokens", "tokens/s", "s to make it"), "")
            rows.append(row)
            print(row, flush=True)
    return "\n\n".join([
        "# What a step costs at the true sizes",
        __doc__.strip().replace("\n", " ").replace("  ", "\n\n"),
        f"Measured on: {machine()}, {o.threads} threads. {o.steps} steps after one that is not "
        f"counted, {TOKENS // o.piece} pieces of {o.piece} tokens each; RCD at density 1/64 with "
        "blocks of 1/64, top-k at density 1/64.",
        table(rows),
    ])  # fmt: skip


if __name__ == "__main__":
    Experiment.main(
        run, __doc__, "rcd_true_size", "runs/rcd_true_size", models=tuple(MODELS), piece=128,
        steps=3, threads=2, most_gb=12.0,
    )  # fmt: skip
