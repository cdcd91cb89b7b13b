"""Time against width at a fixed number of nonzeros."""

import copy
from typing import Any

import torch

from hf_circuit_sparsity.modeling.configuration_circuitgpt import CircuitGPTConfig
from hf_circuit_sparsity.modeling.sparse_layers import sparse_layers

from ..experiment import Experiment, table
from .plain import random_sparse_model
from .timing import Timing, interleaved, main, ratio, settings

NONZEROS = 100_000  # per model: what 2 layers of d_model 2048 hold at 1 in 1000
TOKENS = 256
STYLES = {"dense": "C3-o", "on the nonzeros": "C0-o", "linear layers, dense": "C3--s",
          "linear layers, on the nonzeros": "C0--s"}  # fmt: skip


@torch.no_grad()
def measure(width: int, device: str, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """The timings, entries and nonzeros of the linear layers at one width."""
    config = CircuitGPTConfig(n_layer=2, d_model=width, vocab_size=512, block_size=TOKENS)
    entries = 2 * 12 * width**2
    nonzeros = min(NONZEROS, entries // 20)
    dense = random_sparse_model(config, nonzeros / entries, device, dtype)
    sparse = copy.deepcopy(dense).to_sparse()
    ids = torch.arange(TOKENS, device=device)[None] % config.vocab_size
    layers = {n: layer for n, layer in sparse_layers(sparse).items() if ".h." in n}
    inputs = {
        name: torch.randn(TOKENS, layer.shape[1], device=device, dtype=dtype)
        for name, layer in layers.items()
    }
    times = interleaved(
        {
            "dense": lambda: dense(ids),
            "on the nonzeros": lambda: sparse(ids),
            "linear layers, dense": lambda: [dense.get_submodule(n)(inputs[n]) for n in layers],
            "linear layers, on the nonzeros": lambda: [layers[n](inputs[n]) for n in layers],
        },
        rounds=rounds,
        device=device,
    )
    stored = sum(layer.values.numel() for layer in layers.values())
    return {"d_model": width, "entries": entries, "nonzeros": stored, "times": times}


def run(experiment: Experiment) -> str:
    """The table and the picture."""
    device, dtype, quick = settings(experiment)
    widths = (128, 256, 512) if quick else (512, 1024, 2048, 4096)
    return report(experiment, [measure(w, device, dtype, 3 if quick else 7) for w in widths])


def report(experiment: Experiment, results: list[dict[str, Any]]) -> str:
    """What [`measure`] returned for every width, as a table and a picture."""
    rows = []
    for result in results:
        times: dict[str, Timing] = result["times"]
        rows.append(
            {
                "d_model": result["d_model"],
                "entries": f"{result['entries']:.1e}",
                "nonzeros": f"{result['nonzeros']:.1e}",
                **{f"{name} (ms)": timing for name, timing in times.items()},
                "dense / nonzeros": ratio(times["dense"], times["on the nonzeros"]),
            }
        )

    def draw(axes: Any) -> None:
        widths = [result["d_model"] for result in results]
        for name, style in STYLES.items():
            axes.plot(widths, [1e3 * r["times"][name].median for r in results], style, label=name)
        axes.set(
            xscale="log", yscale="log",
            xlabel="d_model", ylabel=f"ms per forward of {TOKENS} tokens",
            title="Time against width at a fixed number of nonzeros",
        )  # fmt: skip
        axes.set_xticks(widths, [str(w) for w in widths])
        axes.minorticks_off()
        axes.legend()

    picture = experiment.picture(draw, "Time against width", (6, 4))
    _, dtype, _ = settings(experiment)
    return f"Two layers, {TOKENS} tokens, {dtype}; median (range). {picture}\n\n{table(rows)}"


if __name__ == "__main__":
    main(run, __doc__, "width")
