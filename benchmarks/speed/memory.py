"""Peak memory of a training step, and of learning masks, against the plain implementation.

Every side is a process of its own that makes the model and takes a few steps; the peak is what that
process grew by, weights included. "compact" is ours within `compact_activations`.

glibc keeps much of what it was given back, in pieces; with `MALLOC_MMAP_THRESHOLD_=1048576` in the
environment it returns large tensors at once, so that a peak is what was needed.
"""

import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from statistics import median
from typing import Any

import torch

from hf_circuit_sparsity.modeling.configuration_circuitgpt import CircuitGPTConfig
from hf_circuit_sparsity.optim.param_groups import sparse_param_groups
from hf_circuit_sparsity.optim.rcd.optimizer import RCDSparseOptimizer
from hf_circuit_sparsity.optim.rcd.partial_gradients import PartialGradients
from hf_circuit_sparsity.optim.saved_activations import compact_activations
from hf_circuit_sparsity.optim.sparse_init import sparse_from_config

from ..experiment import Experiment, in_new_process, peak_memory, table
from .circuits import mask_updates
from .plain import random_sparse_model
from .timing import main, settings
from .training_step import TrainingStep

DENSITY = 1 / 64
SIDES = ("plain", "ours", "ours, compact")
RCD = ("RCD", "RCD, compact")
# When memory goes back to the system; read as a process starts.
THRESHOLD = "MALLOC_MMAP_THRESHOLD_"
RETURNS = {"when glibc likes": None, "at once": "1048576"}


def training(
    side: str, width: int, layers: int, rows: int, context: int, threads: int
) -> dict[str, float]:
    """CPU seconds and peak of steps, and what AdamW holds: weights, gradients and moments."""
    torch.set_num_threads(threads)
    before = peak_memory()
    config = CircuitGPTConfig(n_layer=layers, d_model=width, block_size=context, vocab_size=2048)
    model = random_sparse_model(config, DENSITY)
    generator = torch.Generator().manual_seed(1)
    batch = torch.randint(config.vocab_size, (rows, context), generator=generator)
    plain = side == "plain"
    step = TrainingStep(model, batch, DENSITY, plain=plain, nonzeros=not plain)
    with compact_activations(model) if side.endswith("compact") else nullcontext():
        seconds = _cpu_seconds(step)
    held = 4 * 4 * sum(p.numel() for p in model.parameters())
    return {"seconds": seconds, "held": held, "peak": peak_memory() - before}


def random_descent(
    side: str, width: int, layers: int, rows: int, context: int, threads: int
) -> dict[str, float]:
    """The same of random coordinate descent on nonzeros alone, which has no dense matrix."""
    torch.set_num_threads(threads)
    before = peak_memory()
    config = CircuitGPTConfig(
        n_layer=layers, d_model=width, block_size=context, vocab_size=2048,
        enable_bigram_table=False,
    )  # fmt: skip
    model = sparse_from_config(config, DENSITY).train()
    generator = torch.Generator().manual_seed(1)
    batch = torch.randint(config.vocab_size, (rows, context), generator=generator)
    groups = sparse_param_groups(model)
    optimizer = RCDSparseOptimizer(groups, target_density=DENSITY, total_steps=9)

    def step() -> None:
        model(batch, labels=batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    compact = compact_activations(model) if side.endswith("compact") else nullcontext()
    with PartialGradients(model, optimizer), compact:
        seconds = _cpu_seconds(step)
    held = 3 * 4 * sum(p.numel() for p in model.parameters())
    return {"seconds": seconds, "held": held, "peak": peak_memory() - before}


def pruning(side: str, shape: dict[str, int], pairs: int, threads: int) -> dict[str, float]:
    """The same of updates of masks of a model whose weights are dense matrices."""
    torch.set_num_threads(threads)
    before = peak_memory()
    model = random_sparse_model(CircuitGPTConfig(**shape), 1 / 1000).requires_grad_(False)
    held, update = 4 * sum(p.numel() for p in model.parameters()), mask_updates(model, pairs)[side]
    return {"seconds": _cpu_seconds(update), "held": held, "peak": peak_memory() - before}


def _cpu_seconds(call: Callable[[], object]) -> float:
    """Of one of three calls; the first, which fills caches, does not count."""
    seconds = []
    for _ in range(3):
        start = time.process_time()
        call()
        seconds.append(time.process_time() - start)
    return median(seconds[1:])


def _each(measure: Callable[..., dict[str, float]], sides: tuple[str, ...], *args: Any) -> Any:
    """Way of returning memory → side → what was measured in a process of its own."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    before = os.environ.pop(THRESHOLD, None)
    try:
        for name, value in RETURNS.items():
            if value is not None:
                os.environ[THRESHOLD] = value
            found[name] = {side: in_new_process(measure, side, *args) for side in sides}
    finally:
        os.environ.pop(THRESHOLD, None)
        if before is not None:
            os.environ[THRESHOLD] = before
    return found


def run(experiment: Experiment) -> str:
    """The tables."""
    quick = settings(experiment)[2]
    threads = torch.get_num_threads()
    trained, descended = [], []
    for width in (64,) if quick else (1024, 2048):
        layers, rows, context = (2, 4, 64) if quick else (4, 8, 256)
        about = {"d_model": str(width), "layers": str(layers), "tokens": f"{rows} × {context}"}
        arguments = (width, layers, rows, context, threads)
        trained += _rows(about, _each(training, SIDES, *arguments))
        descended += _rows(about, _each(random_descent, RCD, *arguments))
    shape = {"n_layer": 8, "d_model": 2048, "d_head": 16, "vocab_size": 2048, "block_size": 256}
    if quick:
        shape |= {"n_layer": 1, "d_model": 64}
    pairs = 2 if quick else 8
    found = _each(pruning, SIDES[:2], shape, pairs, threads)
    about = {"d_model": str(shape["d_model"]), "layers": str(shape["n_layer"])}
    return "\n\n".join([
        f"A step of top-k AdamW at density 1/64, float32. *Held* are weights, gradients and the "
        f"two moments; the rest of a peak is mostly what the backward pass needs.\n\n"
        f"{table(trained)}",
        f"A step of random coordinate descent on nonzeros alone. *Held* are weights and moments."
        f"\n\n{table(descended)}",
        f"An update of masks at the released shape, 1 in 1000 nonzero, {2 * pairs} sequences. "
        f"*Held* are the weights.\n\n{table(_rows(about, found))}",
    ])  # fmt: skip


def _rows(
    about: dict[str, str], found: dict[str, dict[str, dict[str, float]]]
) -> list[dict[str, str]]:
    """A line for every way of returning memory and every side; the first side is compared with."""
    first = next(iter(next(iter(found.values()))))
    return [
        {
            **about,
            "memory is returned": returned,
            "implementation": side,
            "held (MB)": f"{sizes['held'] / 1e6:,.0f}",
            "peak (MB)": f"{sizes['peak'] / 1e6:,.0f}",
            f"{first} / this": f"{sides[first]['peak'] / sizes['peak']:.1f} ×",
            "peak less held (MB)": f"{_rest(sizes) / 1e6:,.0f}",
            f"{first} / this, less held": f"{_rest(sides[first]) / _rest(sizes):.1f} ×",
            "CPU seconds": f"{sizes['seconds']:.2f}",
        }
        for returned, sides in found.items()
        for side, sizes in sides.items()
    ]


def _rest(sizes: dict[str, float]) -> float:
    return max(1.0, sizes["peak"] - sizes["held"])


if __name__ == "__main__":
    main(run, __doc__, "memory")
