"""Time against width at a fixed number of nonzeros."""

import copy
from pathlib import Path

import torch

from hf_circuit_sparsity.modeling.configuration_circuitgpt import CircuitGPTConfig
from hf_circuit_sparsity.modeling.sparse_layers import sparse_layers

from .measure import interleaved, main, ratio, save_figure, table
from .plain import random_sparse_model

NONZEROS = 100_000  # per model: what 2 layers of d_model 2048 hold at 1 in 1000
TOKENS = 256


@torch.no_grad()
def measure(
    device: str, dtype: torch.dtype, quick: bool
) -> list[tuple[int, dict[str, object], int, int]]:
    """For every width: the timings, dense parameters and nonzeros of the linear layers."""
    results = []
    for width in (128, 256, 512) if quick else (512, 1024, 2048, 4096):
        config = CircuitGPTConfig(n_layer=2, d_model=width, vocab_size=512, block_size=TOKENS)
        entries = 2 * 12 * width**2
        nonzeros = min(NONZEROS, entries // 20)
        dense = random_sparse_model(config, nonzeros / entries, device, dtype)
        sparse = copy.deepcopy(dense).to_sparse()
        ids = torch.arange(TOKENS, device=device)[None] % config.vocab_size
        layers = [
            (layer, torch.randn(TOKENS, layer.shape[1], device=device, dtype=dtype))
            for name, layer in sparse_layers(sparse).items()
            if ".h." in name
        ]
        twins = [dense.get_submodule(n) for n in sparse_layers(sparse) if ".h." in n]
        times = interleaved(
            {
                "dense": lambda dense=dense, ids=ids: dense(ids),
                "on the nonzeros": lambda sparse=sparse, ids=ids: sparse(ids),
                "linear layers, dense": lambda layers=layers, twins=twins: [
                    twin(x) for twin, (_, x) in zip(twins, layers, strict=True)
                ],
                "linear layers, on the nonzeros": lambda layers=layers: [
                    layer(x) for layer, x in layers
                ],
            },
            rounds=3 if quick else 7,
            device=device,
        )
        stored = sum(layer.values.numel() for layer, _ in layers)
        results.append((width, times, entries, stored))
    return results


def run(device: str, dtype: torch.dtype, quick: bool, picture: Path | None = None) -> str:
    """The table; also draws the plot, as `width.png` here unless told where."""
    results = measure(device, dtype, quick)
    names = list(results[0][1])
    lines = [
        (width, f"{entries:.1e}", f"{stored:.1e}", *times.values(),
         ratio(times["dense"], times["on the nonzeros"]))
        for width, times, entries, stored in results
    ]  # fmt: skip
    drawn = _draw(results, picture or Path("width.png"))
    header = ("d_model", "entries", "nonzeros", *(f"{n} (ms)" for n in names), "dense / nonzeros")
    return f"Two layers, {TOKENS} tokens, {dtype}; median (range). {drawn}\n\n" + table(
        header, lines
    )


def _draw(results: list, picture: Path) -> str:
    try:
        import matplotlib
    except ImportError:
        return "The plot needs matplotlib: pip install 'hf-circuit-sparsity[viz]'."
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    widths = [result[0] for result in results]
    styles = {"dense": "C3-o", "on the nonzeros": "C0-o", "linear layers, dense": "C3--s",
              "linear layers, on the nonzeros": "C0--s"}  # fmt: skip
    for name, style in styles.items():
        axes.plot(widths, [1e3 * r[1][name].median for r in results], style, label=name)
    axes.set(
        xscale="log", yscale="log", xlabel="d_model", ylabel="ms per forward of 256 tokens",
        title="Time against width at a fixed number of nonzeros",
    )  # fmt: skip
    axes.set_xticks(widths, [str(w) for w in widths])
    axes.minorticks_off()
    axes.legend()
    save_figure(figure, picture)
    pyplot.close(figure)
    return f"![Time against width]({picture.name})"


if __name__ == "__main__":
    main(__doc__, run)
