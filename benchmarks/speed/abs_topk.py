"""AbsTopK forward and backward, against `torch.topk` and scatter."""

import torch
from torch.nn import functional as F

from hf_circuit_sparsity.modeling.abs_topk import abs_topk

from .measure import interleaved, main, ratio, table
from .plain import abs_topk_plain

SHAPES = ((256, 8192), (256, 2048), (2048, 1024), (2048, 4096), (1, 2048))


def run(device: str, dtype: torch.dtype, quick: bool) -> str:
    """The table, a quarter of the entries kept."""
    generator = torch.Generator().manual_seed(0)
    lines = []
    for tokens, width in SHAPES[:2] if quick else SHAPES:
        x = torch.randn(tokens, width, generator=generator).to(device=device, dtype=dtype)
        up = torch.randn(tokens, width, generator=generator).to(device=device, dtype=dtype)
        k = width // 4
        for name, entries in (("normal", x), ("after GELU", F.gelu(x)), ("after ReLU", x.relu())):
            if quick and name != "normal":
                continue
            plain, ours = entries.clone().requires_grad_(), entries.clone().requires_grad_()
            kept = [f(entries, k).abs().sort(-1).values for f in (abs_topk, abs_topk_plain)]
            if not torch.equal(*kept):  # they may keep others of equal magnitude
                raise AssertionError(f"the two disagree at {tokens} × {width}, {name}")

            def both(function, leaf, up=up, k=k):
                leaf.grad = None
                function(leaf, k).backward(up)

            times = interleaved(
                {
                    "plain": lambda e=entries, k=k: abs_topk_plain(e, k),
                    "ours": lambda e=entries, k=k: abs_topk(e, k),
                    "plain, both": lambda f=both, leaf=plain: f(abs_topk_plain, leaf),
                    "ours, both": lambda f=both, leaf=ours: f(abs_topk, leaf),
                },
                rounds=5 if quick else 15,
                device=device,
            )
            lines.append(
                (
                    f"{tokens} × {width}",
                    name,
                    times["plain"],
                    times["ours"],
                    ratio(times["plain"], times["ours"]),
                    times["plain, both"],
                    times["ours, both"],
                    ratio(times["plain, both"], times["ours, both"]),
                )
            )
    header = (
        "shape",
        "entries",
        "plain forward (ms)",
        "ours",
        "plain / ours",
        "plain forward + backward",
        "ours",
        "plain / ours",
    )
    return f"{dtype}; ms, median (range).\n\n" + table(header, lines)


if __name__ == "__main__":
    main(__doc__, run)
