"""Exact top-k projection of a matrix, against `torch.topk` over the flattened matrix."""

import torch

from hf_circuit_sparsity.optim.projection import project_topk_

from ..experiment import Experiment, table
from .plain import project_plain_
from .timing import interleaved, main, ratio, settings


def run(experiment: Experiment) -> str:
    """The table; that both sides keep the same entries but for ties is checked first."""
    device, dtype, quick = settings(experiment)
    rows, width = (1024, 1024) if quick else (8192, 2048)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, width, generator=generator).to(device=device, dtype=dtype)
    scratch = torch.empty_like(weight)
    lines = []
    for divisor in (1000, 64, 2):
        k = weight.numel() // divisor

        def projected(project, minimum, k=k):
            scratch.copy_(weight)
            project(scratch, k, minimum)
            return scratch

        expected = projected(project_plain_, 0).clone()
        # topk keeps any of several that tie for the last place, ours the first of them.
        differing = weight[projected(project_topk_, 0) != expected].abs().unique()
        if len(differing) > 1:
            raise AssertionError(f"the two projections disagree at k={k}")
        times = interleaved(
            {
                "topk (ms)": lambda: projected(project_plain_, 0),
                "topk + row minimum 4": lambda: projected(project_plain_, 4),
                "ours": lambda: projected(project_topk_, 0),
                "ours + row minimum 4": lambda: projected(project_topk_, 4),
                "of each: copying the matrix": lambda: scratch.copy_(weight),
            },
            rounds=3 if quick else 7,
            device=device,
        )
        plain, plain_rows, ours, ours_rows, _ = times.values()
        lines.append(
            {
                "kept": f"1/{divisor}",
                **times,
                "topk / ours": ratio(plain, ours),
                "topk / ours + minimum": ratio(plain, ours_rows),
                "both with minimum": ratio(plain_rows, ours_rows),
            }
        )
    return (
        f"{rows} × {width} entries, {dtype}; ms, median (range). The plain row minimum keeps more "
        f"entries than ours, which takes them out of the budget.\n\n{table(lines)}"
    )


if __name__ == "__main__":
    main(run, __doc__, "projection")
