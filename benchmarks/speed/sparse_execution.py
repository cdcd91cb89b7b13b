"""A sparse model run on its nonzeros: forward and `generate`, against dense."""

import copy
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from hf_circuit_sparsity.kernels.cpu import without_kernels
from hf_circuit_sparsity.modeling.configuration_circuitgpt import CircuitGPTConfig
from hf_circuit_sparsity.modeling.csr import CSR
from hf_circuit_sparsity.modeling.modeling_circuitgpt import (
    AbsTopK,
    CircuitGPTAttention,
    CircuitGPTForCausalLM,
)
from hf_circuit_sparsity.modeling.sparse_layers import SparseWeight

from ..experiment import Experiment, table
from .plain import plainly, random_sparse_model
from .timing import Timing, interleaved, main, now, ratio, settings

BLOCK_BY_BLOCK = "block by block"
KINDS = (
    ("linear layers and embeddings", (SparseWeight, nn.Linear, nn.Embedding)),
    ("AbsTopK", (AbsTopK,)),
    ("norm", (nn.RMSNorm, nn.LayerNorm)),
    ("GELU", (nn.GELU, nn.ReLU)),
    ("attention", (CircuitGPTAttention,)),
)


@torch.no_grad()
def run(experiment: Experiment) -> str:
    """Three tables: forward, generation, and the density at which the two ways break even."""
    device, dtype, quick = settings(experiment)
    config = CircuitGPTConfig(n_layer=2, d_model=256, vocab_size=512) if quick else None
    dense = random_sparse_model(config or CircuitGPTConfig(), 1e-3, device, dtype)
    sparse = copy.deepcopy(dense).to_sparse()
    parts = [_forward(dense, sparse, quick), _generate(dense, sparse, quick)]
    del dense, sparse
    parts.append(_crossover(device, dtype, quick))
    return "\n\n".join(parts)


def _forward(dense: CircuitGPTForCausalLM, sparse: CircuitGPTForCausalLM, quick: bool) -> str:
    config, device = dense.config, str(dense.device)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(config.vocab_size, (1, 256), generator=generator).to(dense.device)

    def run_plain() -> torch.Tensor:
        with plainly(dense):
            return dense(ids).logits

    def run_without_kernels() -> torch.Tensor:
        with without_kernels():
            return sparse(ids).logits

    def run_block_by_block() -> torch.Tensor:
        with _block_by_block(sparse):
            return sparse(ids).logits

    apart = float((dense(ids).logits - sparse(ids).logits).abs().max())
    times = interleaved(
        {
            "plain": run_plain,
            "ours, dense": lambda: dense(ids),
            "ours, on the nonzeros": lambda: sparse(ids),
            BLOCK_BY_BLOCK: run_block_by_block,
            "the same without kernels": run_without_kernels,
        },
        rounds=3 if quick else 5,
        device=device,
    )
    with plainly(dense):
        of_which = {"plain": shares(dense, ids)}
    of_which["ours, dense"] = shares(dense, ids)
    of_which["ours, on the nonzeros"] = "–"  # who looks on gets the next
    of_which[BLOCK_BY_BLOCK] = shares(sparse, ids)
    with without_kernels():
        of_which["the same without kernels"] = shares(sparse, ids)
    rows = [
        {
            "implementation": name,
            "ms": timing,
            "plain / this": ratio(times["plain"], timing),
            "ours dense / this": ratio(times["ours, dense"], timing),
            "of which": of_which[name],
        }
        for name, timing in times.items()
    ]
    return (
        f"Forward of 256 tokens: {config.n_layer} layers, d_model {config.d_model}, d_mlp "
        f"{config.d_mlp}, {config.n_head} heads, vocabulary {config.vocab_size}, AbsTopK at eight "
        f"sites, 1 in 1000 nonzero, {dense.dtype}; ms, median (range). The logits of the two ways "
        f"are at most {apart:.1g} apart.\n\n{table(rows)}"
    )


@contextmanager
def _block_by_block(model: CircuitGPTForCausalLM) -> Iterator[None]:
    """Blocks are called one by one, as where somebody looks on."""
    model.transformer.run_blocks = lambda *args: None
    try:
        yield
    finally:
        del model.transformer.run_blocks


def shares(model: nn.Module, ids: torch.Tensor) -> str:
    """What share of a forward pass each kind of module takes, without what lies within it.

    While it looks on, modules are called one by one.
    """
    spent: dict[str, float] = defaultdict(float)
    open_: list[list[float]] = []

    def enter(*_: object) -> None:
        open_.append([now(ids.device.type), 0.0])

    def leave(kind: str) -> None:
        start, within = open_.pop()
        took = now(ids.device.type) - start
        spent[kind] += took - within
        if open_:
            open_[-1][1] += took

    hooks = []
    for module in model.modules():
        kind = next((name for name, types in KINDS if isinstance(module, types)), None)
        if kind is not None:
            hooks.append(module.register_forward_pre_hook(enter))
            hooks.append(module.register_forward_hook(lambda *_, kind=kind: leave(kind)))
    start = now(ids.device.type)
    model(ids)
    total = now(ids.device.type) - start
    for hook in hooks:
        hook.remove()
    spent["rest"] = total - sum(spent.values())
    largest_first = sorted(spent, key=spent.__getitem__, reverse=True)
    return ", ".join(f"{kind} {100 * spent[kind] / total:.0f} %" for kind in largest_first)


def _generate(dense: CircuitGPTForCausalLM, sparse: CircuitGPTForCausalLM, quick: bool) -> str:
    config, device = dense.config, str(dense.device)
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(config.vocab_size, (1, 96), generator=generator).to(dense.device)
    common = dict(do_sample=False, pad_token_id=0)

    def new_tokens(model: CircuitGPTForCausalLM, prompt: int, count: int, **options: bool) -> None:
        model.generate(
            ids[:, :prompt], max_new_tokens=count, min_new_tokens=count, **common, **options
        )

    def recompute_plainly() -> None:
        with plainly(dense):
            new_tokens(dense, 95, 2, use_cache=False)

    def block_by_block() -> None:
        with _block_by_block(sparse):
            new_tokens(sparse, 64, 64)

    # Recomputing costs in proportion to the length, which is 96 in the middle of the 64 tokens
    # that follow a prompt of 64: two steps there stand for all.
    tokens = {"plain, recomputed": 2, "ours dense, recomputed": 2}
    times = interleaved(
        {
            "plain, recomputed": recompute_plainly,
            "ours dense, recomputed": lambda: new_tokens(dense, 95, 2, use_cache=False),
            "ours dense, cached": lambda: new_tokens(dense, 64, 64),
            f"ours on the nonzeros, {BLOCK_BY_BLOCK}": block_by_block,
            "ours on the nonzeros, cached": lambda: new_tokens(sparse, 64, 64),
        },
        rounds=2 if quick else 3,
        device=device,
    )
    each = {n: Timing(tuple(s / tokens.get(n, 64) for s in t.seconds)) for n, t in times.items()}
    fast = each["ours on the nonzeros, cached"]
    rows = [
        {"implementation": n, "ms per token": t, "this / ours on the nonzeros": ratio(t, fast)}
        for n, t in each.items()
    ]
    return (
        "`generate` of 64 tokens after a prompt of 64; ms per token, median (range).\n\n"
        + table(rows)
    )


def _crossover(device: str, dtype: torch.dtype, quick: bool) -> str:
    rows, width = (1024, 256) if quick else (4096, 1024)
    generator = torch.Generator().manual_seed(3)
    lines = []
    for divisor in (1000, 64, 16, 8, 6, 4, 3):
        weight = torch.randn(rows, width, generator=generator)
        weight *= torch.rand(rows, width, generator=generator) < 1 / divisor
        weight = weight.to(device=device, dtype=dtype)
        csr = CSR.from_dense(weight)
        line: dict[str, object] = {"nonzero": f"1/{divisor}"}
        for tokens in (1, 256):
            x = torch.randn(tokens, width, generator=generator).to(device=device, dtype=dtype)
            times = interleaved(
                {
                    "dense": lambda x=x, weight=weight: nn.functional.linear(x, weight),
                    "sparse": lambda x=x, csr=csr: csr.linear(x),
                },
                rounds=5 if quick else 15,
                device=device,
            )
            line[f"{tokens} token(s): dense (ms)"] = times["dense"]
            line[f"{tokens}: on the nonzeros"] = times["sparse"]
            line[f"{tokens}: ratio"] = ratio(times["dense"], times["sparse"])
        lines.append(line)
    return f"One linear layer {rows} × {width}: where a layer breaks even.\n\n{table(lines)}"


if __name__ == "__main__":
    main(run, __doc__, "sparse_execution")
