"""How time grows: with the width at a fixed number of nonzeros, with context, layers and density.

One of these changes, the others stay. An exponent is the slope of a straight line through the
logarithms of time and size, and the one in brackets that of the last step alone. "What grows" names
the kinds of modules that take most at the largest size, and how much of it, of a pass in which they
are called one by one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import log
from typing import Any

import torch

from hf_circuit_sparsity.modeling.configuration_circuitgpt import CircuitGPTConfig
from hf_circuit_sparsity.modeling.sparse_layers import sparse_layers

from ..experiment import Experiment, table
from .plain import plainly, random_sparse_model
from .sparse_execution import shares
from .timing import Timing, interleaved, main, ratio, settings

NONZEROS = 100_000  # per model, where the width changes: 2 layers of d_model 2048 at 1 in 1000
STYLES = {"plain": "C3-o", "dense": "C1-o", "on the nonzeros": "C0-o"}
LINEAR = {"linear layers, dense": "C1--s", "linear layers, on the nonzeros": "C0--s"}


@dataclass(frozen=True)
class Axis:
    """What changes, and what all else is.

    Attributes:
        name: for people.
        values: from small to large.
        shape: the model and the tokens at a value: fields of the config, density and tokens.
        what: stays the same.
    """

    name: str
    values: tuple[float, ...]
    shape: Callable[[Any], dict[str, Any]]
    what: str


def axes(quick: bool) -> list[Axis]:
    """The four, large or small."""
    d, layers, tokens = (64, 2, 32) if quick else (1024, 4, 256)

    def wide(width: int) -> dict[str, Any]:
        depth = 1 if quick else 2
        entries = 12 * depth * width**2
        density = min(NONZEROS, entries // 20) / entries
        return {"d_model": width, "n_layer": depth, "density": density, "tokens": tokens}

    def like(**changed: Any) -> dict[str, Any]:
        return {"d_model": d, "n_layer": layers, "density": 1e-3, "tokens": tokens, **changed}

    rest = f"d_model {d}, {layers} layers, {tokens} tokens, 1 in 1000 nonzero"
    widths, contexts, depths, divisors = (
        ((64, 128), (16, 32), (1, 2), (64, 16))
        if quick
        else ((512, 1024, 2048, 4096), (256, 512, 1024, 2048), (2, 4, 8, 16), (1000, 250, 64, 16))
    )
    densities = tuple(1 / n for n in divisors)
    return [
        Axis("width", widths, wide, f"{NONZEROS:,} nonzeros in linear layers, {tokens} tokens"),
        Axis("context", contexts, lambda n: like(tokens=n), rest),
        Axis("layers", depths, lambda n: like(n_layer=n), rest),
        Axis("density", densities, lambda share: like(density=share), rest),
    ]


@torch.no_grad()
def measure(
    shape: dict[str, Any], by_layer: bool, device: str, dtype: torch.dtype, rounds: int
) -> dict[str, Any]:
    """Timings of a forward pass, its nonzeros, and what takes how much of it on the nonzeros."""
    shape = dict(shape)
    density, tokens = shape.pop("density"), shape.pop("tokens")
    config = CircuitGPTConfig(vocab_size=512, block_size=tokens, **shape)
    model = random_sparse_model(config, density, device, dtype)
    ids = torch.arange(tokens, device=device)[None] % config.vocab_size
    linear = {n for n, m in model.named_modules() if ".h." in n and type(m) is torch.nn.Linear}
    inputs = {
        n: torch.randn(tokens, model.get_submodule(n).in_features, device=device, dtype=dtype)
        for n in linear
    }

    def plain() -> None:
        with plainly(model):
            model(ids)

    def layers(within: torch.nn.Module) -> list[torch.Tensor]:
        return [within.get_submodule(name)(x) for name, x in inputs.items()]

    sides: dict[str, Callable[[], object]] = {"plain": plain, "dense": lambda: model(ids)}
    times = interleaved(
        {**sides, **({"linear layers, dense": lambda: layers(model)} if by_layer else {})},
        rounds, device,
    )  # fmt: skip
    model = model.to_sparse()  # in place, as the widest would not be there twice
    sides = {"on the nonzeros": lambda: model(ids)}
    if by_layer:
        sides["linear layers, on the nonzeros"] = lambda: layers(model)
    times |= interleaved(sides, 2 * rounds, device)
    stored = sum(m.values.numel() for n, m in sparse_layers(model).items() if ".h." in n)
    return {"nonzeros": stored, "times": times, "shares": shares(model, ids)}


def exponent(values: tuple[float, ...], times: list[Timing]) -> str:
    """Of time in size: through all, and in the last step."""
    x, y = [log(v) for v in values], [log(t.median) for t in times]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    slope /= sum((a - mean_x) ** 2 for a in x)
    return f"{slope:.2f} ({(y[-1] - y[-2]) / (x[-1] - x[-2]):.2f})"


def run(experiment: Experiment) -> str:
    """The tables and the picture."""
    device, dtype, quick = settings(experiment)
    found = {
        axis: [
            measure(axis.shape(v), axis.name == "width", device, dtype, 2 if quick else 3)
            for v in axis.values
        ]
        for axis in axes(quick)
    }
    return report(experiment, found)


def report(experiment: Experiment, found: dict[Axis, list[dict[str, Any]]]) -> str:
    """What [`measure`] returned for every value of every axis, as tables and a picture."""
    tables, exponents = [], []
    for axis, results in found.items():
        rows = [
            {
                axis.name: _value(value),
                "nonzeros": f"{result['nonzeros']:.1e}",
                **{f"{name} (ms)": timing for name, timing in result["times"].items()},
                "plain / nonzeros": ratio(
                    result["times"]["plain"], result["times"]["on the nonzeros"]
                ),
                "on the nonzeros, of which": result["shares"],
            }
            for value, result in zip(axis.values, results, strict=True)
        ]
        tables.append(f"**{axis.name}**; {axis.what}:\n\n{table(rows)}")
        line = {"time against": axis.name}
        for name in (*STYLES, *LINEAR):
            timings = [result["times"].get(name) for result in results]
            line[name] = exponent(axis.values, timings) if timings[0] else "–"
        line["what grows (at the largest)"] = ", ".join(results[-1]["shares"].split(", ")[:2])
        exponents.append(line)

    def draw(pictures: Any) -> None:
        for one, (axis, results) in zip(pictures.flat, found.items(), strict=True):
            for name, style in (STYLES | LINEAR).items():
                if name in results[0]["times"]:
                    medians = [1e3 * result["times"][name].median for result in results]
                    one.plot(axis.values, medians, style, label=name)
            one.set(xscale="log", yscale="log", title=axis.name, ylabel="ms per forward")
            one.set_xticks(axis.values, [_value(v) for v in axis.values])
            one.minorticks_off()
        pictures.flat[0].legend(fontsize=7)

    picture = experiment.picture(draw, "Time of a forward pass", (9, 7), nrows=2, ncols=2)
    _, dtype, _ = settings(experiment)
    return "\n\n".join(
        [f"{dtype}; median (range). {picture}", f"Exponents:\n\n{table(exponents)}", *tables]
    )


def _value(value: float) -> str:
    return f"1/{1 / value:.0f}" if value < 1 else f"{value:,}"


if __name__ == "__main__":
    main(run, __doc__, "growth")
