"""Exact top-k projection of a matrix, against `torch.topk` over the flattened matrix."""

import torch

from hf_circuit_sparsity.optim.projection import project_topk_

from .measure import interleaved, main, ratio, table
from .plain import project_plain_


def run(device: str, dtype: torch.dtype, quick: bool) -> str:
    """The table; that both sides keep the same entries but for ties is checked first."""
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
                "plain": lambda: projected(project_plain_, 0),
                "plain, minimum": lambda: projected(project_plain_, 4),
                "ours": lambda: projected(project_topk_, 0),
                "ours, minimum": lambda: projected(project_topk_, 4),
                "copy": lambda: scratch.copy_(weight),
            },
            rounds=3 if quick else 7,
            device=device,
        )
        lines.append(
            (
                f"1/{divisor}",
                times["plain"],
                times["plain, minimum"],
                times["ours"],
                times["ours, minimum"],
                ratio(times["plain"], times["ours"]),
                ratio(times["plain"], times["ours, minimum"]),
                ratio(times["plain, minimum"], times["ours, minimum"]),
                f"{1e3 * times['copy'].median:.1f}",
            )
        )
    header = (
        "kept",
        "topk (ms)",
        "topk + row minimum 4",
        "ours",
        "ours + row minimum 4",
        "topk / ours",
        "topk / ours + minimum",
        "both with minimum",
        "of each: copying the matrix",
    )
    return (
        f"{rows} × {width} entries, {dtype}; ms, median (range). The plain row minimum keeps more "
        "entries than ours, which takes them out of the budget.\n\n" + table(header, lines)
    )


if __name__ == "__main__":
    main(__doc__, run)
