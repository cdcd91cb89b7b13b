"""AbsTopK forward and backward, against `torch.topk` and scatter."""

import torch
from torch.nn import functional as F

from hf_circuit_sparsity.modeling.functional import abs_topk

from ..experiment import Experiment, table
from .plain import abs_topk_plain
from .timing import interleaved, main, ratio, settings

SHAPES = ((256, 8192), (256, 2048), (2048, 1024), (2048, 4096), (1, 2048))


def run(experiment: Experiment) -> str:
    """The table, a quarter of the entries kept."""
    device, dtype, quick = settings(experiment)
    generator = torch.Generator().manual_seed(0)
    rows = []
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
                    "plain forward (ms)": lambda e=entries, k=k: abs_topk_plain(e, k),
                    "ours": lambda e=entries, k=k: abs_topk(e, k),
                    "plain forward + backward": lambda f=both, x=plain: f(abs_topk_plain, x),
                    "ours, both": lambda f=both, x=ours: f(abs_topk, x),
                },
                rounds=5 if quick else 15,
                device=device,
            )
            forward, ours_forward, both_ways, ours_both = times.values()
            rows.append(
                {
                    "shape": f"{tokens} × {width}",
                    "entries": name,
                    **times,
                    "plain / ours, forward": ratio(forward, ours_forward),
                    "plain / ours, both": ratio(both_ways, ours_both),
                }
            )
    return f"{dtype}; ms, median (range).\n\n{table(rows)}"


if __name__ == "__main__":
    main(run, __doc__, "abs_topk")
