"""Memory of training: top-k on whole matrices against random coordinate descent on nonzeros.

Every side is a process of its own that makes a CircuitGPT and takes a few steps. Weights, optimizer
state and gradients are the bytes of their tensors; the peak is what the process grew by.
"""

from collections.abc import Iterable

import torch

from hf_circuit_sparsity.modeling.configuration_circuitgpt import CircuitGPTConfig
from hf_circuit_sparsity.modeling.modeling_circuitgpt import CircuitGPTForCausalLM
from hf_circuit_sparsity.optim.rcd.optimizer import RCDSparseOptimizer
from hf_circuit_sparsity.optim.sparse_init import sparse_from_config, sparsify_initialization_

from ..experiment import Experiment, in_new_process, machine, peak_memory, table
from ..findings.rcd_race import Run, sparse_optimizer

DENSITY = 1 / 64
SIDES = ("top-k AdamW", "RCD, whole matrices", "RCD, nonzeros alone")


def run_side(side: str, width: int, layers: int, steps: int) -> dict[str, float]:
    """Bytes of weights, state and gradients, and what the process grew by, at most."""
    torch.manual_seed(0)
    before = peak_memory()
    config = CircuitGPTConfig(
        n_layer=layers, d_model=width, d_head=16, block_size=128, vocab_size=2048,
        enable_bigram_table=False,
    )  # fmt: skip
    if side == "RCD, nonzeros alone":
        model = sparse_from_config(config, DENSITY)
    else:
        model = CircuitGPTForCausalLM(config)
        sparsify_initialization_(model, DENSITY)
    settings = {"anneal_start": 0.0, "anneal_end": 0.0}
    run = Run("topk", 1, 1e-2, 2, settings) if side == SIDES[0] else Run("rcd", 1, 1e-2, 2)
    optimizer, computing = sparse_optimizer(model, run, DENSITY)
    batch = torch.randint(2048, (2, 128), generator=torch.Generator().manual_seed(1))
    gradients = 0
    with computing:
        for _ in range(steps):
            model(batch, labels=batch, use_cache=False).loss.backward()
            held = [p.grad for p in model.parameters() if p.grad is not None]
            if isinstance(optimizer, RCDSparseOptimizer):
                states = [optimizer.sparse_state(p) for _, p in optimizer.sparse_parameters()]
                held += [g for s in states for g in s.gradient or () if g is not None]
            gradients = max(gradients, _bytes(held))
            optimizer.step()
            optimizer.zero_grad()
    state = [x for own in optimizer.state_dict()["state"].values() for x in own.values()]
    return {
        "weights": _bytes([*model.parameters(), *model.buffers()]),
        "state": _bytes(x for x in state if isinstance(x, torch.Tensor)),
        "gradients": gradients,
        "peak": peak_memory() - before,
    }


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def run(experiment: Experiment) -> str:
    """The table."""
    width, layers, steps = (getattr(experiment.options, n) for n in ("width", "layers", "steps"))
    found = {side: in_new_process(run_side, side, width, layers, steps) for side in SIDES}
    rows = [
        {
            "side": side,
            **{f"{name} (MB)": f"{size / 1e6:,.1f}" for name, size in sizes.items()},
            "top-k's peak / this": f"{found[SIDES[0]]['peak'] / sizes['peak']:.1f} ×",
        }
        for side, sizes in found.items()
    ]
    return (
        f"{machine()}\n\nCircuitGPT, d_model {width}, {layers} layers, density 1/64, no bigram "
        f"table, {steps} steps of 2 × 128 tokens; block fraction 1/16. Activations are part of the "
        f"peak.\n\n{table(rows)}"
    )


if __name__ == "__main__":
    Experiment.main(run, __doc__, "rcd_memory", "runs/rcd", width=2048, layers=4, steps=2)
