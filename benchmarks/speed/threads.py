"""What a second thread (or an eighth) gives: forward, training step and projection, turn by turn.

All in one process, which changes its number of threads between two calls, so that all meet the same
disturbances. A ratio says little where threads are more than cores that are free.
"""

from collections.abc import Callable

import torch

from hf_circuit_sparsity.modeling.configuration_circuitgpt import CircuitGPTConfig
from hf_circuit_sparsity.optim.projection import project_topk_

from ..experiment import Experiment, table
from .plain import random_sparse_model
from .timing import interleaved, main, ratio, settings
from .training_step import TrainingStep


def run(experiment: Experiment) -> str:
    """A row for every kind of work; a column for every number of threads."""
    device, dtype, quick = settings(experiment)
    before = torch.get_num_threads()
    counts = sorted({1, *(n or before for n in experiment.options.threads)})
    rows = []
    try:
        for name, call in work(device, dtype, quick).items():
            sides = {str(n): _on_threads(call, n) for n in counts}
            times = interleaved(sides, 3 if quick else 12)
            row = {"what": name}
            for n in counts:
                row[f"{n}: ms"] = str(times[str(n)])
                if n > 1:
                    row[f"1 / {n}"] = ratio(times["1"], times[str(n)])
            rows.append(row)
    finally:
        torch.set_num_threads(before)
    return table(rows)


def _on_threads(call: Callable[[], object], count: int) -> Callable[[], None]:
    def called() -> None:
        torch.set_num_threads(count)
        call()

    return called


def work(device: str, dtype: torch.dtype, quick: bool) -> dict[str, Callable[[], object]]:
    """What is timed: name → call."""
    generator = torch.Generator().manual_seed(0)
    small = CircuitGPTConfig(n_layer=2, d_model=256, vocab_size=512) if quick else None
    sparse = random_sparse_model(small or CircuitGPTConfig(), 1e-3, device, dtype).to_sparse()
    ids = torch.randint(512, (1, 256), generator=generator).to(device)

    @torch.no_grad()
    def forward() -> torch.Tensor:
        return sparse(ids).logits

    calls: dict[str, Callable[[], object]] = {"forward, released shape, 1/1000": forward}
    size = {"d_model": 256 if quick else 1024, "n_layer": 2 if quick else 4, "d_head": 16}
    batch = torch.randint(512, (16, 128), generator=generator).to(device)
    for density in (1 / 2, 1 / 64):
        model = random_sparse_model(
            CircuitGPTConfig(vocab_size=2048, block_size=128, **size), density, device, dtype
        )
        step = TrainingStep(model, batch, density)
        calls[f"training step, d_model {size['d_model']}, 1/{1 / density:.0f}"] = step
    weight = torch.randn(4 * size["d_model"], size["d_model"], generator=generator)

    def project() -> None:
        project_topk_(weight.clone(), weight.numel() // 64, 4)

    calls[f"projection, {len(weight)} × {weight.shape[1]}, 1/64"] = project
    return calls


if __name__ == "__main__":
    main(run, __doc__, "threads", threads=(0,))
