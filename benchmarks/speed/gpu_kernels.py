"""Selection on a GPU by Triton, against `torch.topk`: AbsTopK and the projection, and variants.

Every case is first held against the plain path on the device; what fails says so in its row and
the others go on.
"""

import itertools
import time
from collections.abc import Callable, Iterator

import torch

from hf_circuit_sparsity.kernels.cpu import load_triton_kernels, without_kernels
from hf_circuit_sparsity.modeling.configuration_circuitgpt import CircuitGPTConfig
from hf_circuit_sparsity.modeling.functional import abs_topk, abs_topk_reference
from hf_circuit_sparsity.modeling.modeling_circuitgpt import CircuitGPTForCausalLM
from hf_circuit_sparsity.optim.param_groups import sparse_param_groups
from hf_circuit_sparsity.optim.projection import (
    nonzero_budget,
    project_topk_,
    project_topk_each_,
    project_topk_reference_,
)

from ..experiment import Experiment, table
from .plain import abs_topk_plain, project_plain_
from .timing import interleaved, main, ratio

SHAPES = ((2048, 1024), (2048, 2048), (2048, 4096), (256, 16384), (16384, 1024), (16384, 4096))
MATRICES = ((1024, 4096), (4096, 1024), (8192, 2048))
DTYPES = (torch.float32, torch.bfloat16)
DENSITIES = (1 / 64, 1 / 2)
# Entries that a thread holds of a row; entries and warps of a program that reads a matrix.
PER_THREAD = (8, 16, 64)
PROGRAMS = ((2048, 4), (4096, 4), (4096, 8), (8192, 8))


def run(experiment: Experiment) -> str:
    """The tables; needs CUDA."""
    device, quick = experiment.options.device, experiment.options.quick
    kernels = load_triton_kernels()
    if not torch.cuda.is_available() or kernels is None:
        return "This needs a GPU and Triton: nothing was measured."
    bench = _Bench(torch.device(device), calls=3 if quick else 10, rounds=3 if quick else 7)
    parts = [f"ms, median (range), each of {bench.calls} calls in a row."]
    for title, section in (
        ("Ceilings", bench.ceilings),
        ("AbsTopK", bench.abs_topk),
        ("Projection of all matrices of a model", bench.projection_of_models),
        ("Projection", bench.projection),
        ("What the launches of these projections take", bench.profile),
        ("Variants of the projection", bench.projection_variants),
        ("Variants of AbsTopK", bench.abs_topk_variants),
    ):
        start = time.perf_counter()
        text = section() if title.startswith("What") else _table(section())
        parts += [f"### {title} ({time.perf_counter() - start:.0f} s)", text]
        print("\n\n".join(["", *parts[-2:]]), flush=True)
    return "\n\n".join(parts)


class _Bench:
    def __init__(self, device: torch.device, calls: int, rounds: int):
        self.device, self.calls, self.rounds = device, calls, rounds
        self.generator = torch.Generator(device).manual_seed(0)

    def random(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        entries = torch.randn(shape, generator=self.generator, device=self.device)
        return entries.to(dtype)

    def time(self, sides: dict[str, Callable[[], object]]) -> dict:
        return interleaved(sides, self.rounds, str(self.device), self.calls)

    def ceilings(self) -> Iterator[dict]:
        """What the device does at best: a copy."""
        for megabytes in (16, 64, 1024):
            a = torch.randn(megabytes << 18, device=self.device)
            b = torch.empty_like(a)
            took = self.time({"copy (ms)": lambda a=a, b=b: b.copy_(a)})
            rate = 2 * a.nbytes / took["copy (ms)"].median / 1e12
            yield {"MB": megabytes, **took, "TB/s, read and written": f"{rate:.2f}"}

    def abs_topk(self) -> Iterator[dict]:
        for (tokens, width), dtype in itertools.product(SHAPES, DTYPES):
            case = {"shape": f"{tokens} × {width}", "dtype": _short(dtype)}
            k = width // 4

            def measure(tokens=tokens, width=width, dtype=dtype, k=k) -> dict:
                # Several, so that they do not lie in the cache from one call to the next.
                inputs = [self.random(tokens, width, dtype=dtype) for _ in range(4)]
                up = self.random(tokens, width, dtype=dtype)
                leaves = [x.clone().requires_grad_() for x in inputs]
                for x in (inputs[0], inputs[1].relu(), inputs[2].round()):
                    _same(abs_topk(x, k), abs_topk_reference(x, k))
                abs_topk(leaves[0], k).backward(up)
                kept = abs_topk_reference(inputs[0], k) != 0
                _same(leaves[0].grad, torch.where(kept, up, 0))

                def both(function: Callable) -> Callable[[], None]:
                    turn = itertools.cycle(leaves)
                    return lambda: torch.autograd.grad(function(leaf := next(turn), k), leaf, up)

                def forward(function: Callable) -> Callable[[], torch.Tensor]:
                    turn = itertools.cycle(inputs)
                    return lambda: function(next(turn), k)

                times = self.time(
                    {
                        "plain forward": forward(abs_topk_plain),
                        "ours": forward(abs_topk),
                        "plain forward + backward": both(abs_topk_plain),
                        "ours, both": both(abs_topk),
                    }
                )
                plain, ours, plain_both, ours_both = times.values()
                # As in compiled code, whose launches a graph replays: the device's time alone.
                replayed = self.time(
                    {
                        "plain, replayed": graphed(forward(abs_topk_plain), len(inputs)),
                        "ours, replayed": graphed(forward(abs_topk), len(inputs)),
                    }
                )
                replayed = {name: t.divided(len(inputs)) for name, t in replayed.items()}
                on_device = list(replayed.values())
                return {
                    **times,
                    "forward": ratio(plain, ours),
                    "both": ratio(plain_both, ours_both),
                    **replayed,
                    "forward, replayed": ratio(*on_device),
                    "of a copy's bandwidth": _rate(2 * up.nbytes, on_device[1]),
                }

            yield case | _or_error(measure)

    def abs_topk_variants(self) -> Iterator[dict]:
        from hf_circuit_sparsity.kernels.gpu import TritonKernels

        for width, dtype in itertools.product((1024, 4096), DTYPES):
            inputs = [self.random(2048, width, dtype=dtype) for _ in range(4)]

            def measure(inputs=inputs, width=width) -> dict:
                sides = {}
                for per_thread in PER_THREAD:
                    kernels = TritonKernels(per_thread=per_thread)
                    turn = itertools.cycle(inputs)
                    sides[f"{per_thread} per thread"] = lambda f=kernels, t=turn: f.abs_topk(
                        next(t), width // 4, want_mask=False
                    )
                return self.time(sides)

            yield {"shape": f"2048 × {width}", "dtype": _short(dtype)} | _or_error(measure)

    def projection_of_models(self) -> Iterator[dict]:
        """What ends a step of training: every sparse parameter, each with its row minimum."""
        for width, density in itertools.product((1024, 2048), DENSITIES):
            case = {"d_model": width, "kept": f"1/{round(1 / density)}"}

            def measure(width=width, density=density) -> dict:
                model = _Matrices(self, width, density)
                model.one_by_one(project_topk_reference_)
                expected = [matrix.clone() for matrix in model.scratch]
                model.together(project_topk_each_)
                for got, right in zip(model.scratch, expected, strict=True):
                    _same(got, right)
                del expected
                times = self.time(
                    {
                        "copy, in each": model.fresh,
                        "topk": lambda: model.one_by_one(project_plain_),
                        "ours, one by one": lambda: model.one_by_one(project_topk_),
                        "ours": lambda: model.together(project_topk_each_),
                    }
                )
                copy, plain, single, ours = (t.median for t in times.values())
                return {
                    "parameters": str(model),
                    **times,
                    "topk / one by one, less the copy": f"{(plain - copy) / (single - copy):.1f} ×",
                    "topk / ours": f"{(plain - copy) / (ours - copy):.1f} ×",
                }

            yield case | _or_error(measure)

    def projection(self) -> Iterator[dict]:
        for shape, dtype, density in itertools.product(MATRICES, DTYPES, DENSITIES):
            case = {"matrix": "{} × {}".format(*shape), "dtype": _short(dtype)}

            def measure(shape=shape, dtype=dtype, density=density) -> dict:
                weight = self.random(*shape, dtype=dtype)
                scratch = torch.empty_like(weight)
                k = round(weight.numel() * density)

                def projected(project: Callable, minimum: int = 0) -> torch.Tensor:
                    scratch.copy_(weight)
                    project(scratch, k, minimum)
                    return scratch

                for minimum in (0, 4):
                    expected = projected(project_topk_reference_, minimum).clone()
                    _same(projected(project_topk_, minimum), expected)
                times = self.time(
                    {
                        "copy, in each": lambda: scratch.copy_(weight),
                        "topk": lambda: projected(project_plain_),
                        "topk + minimum": lambda: projected(project_plain_, 4),
                        "ours": lambda: projected(project_topk_),
                        "ours + minimum 4": lambda: projected(project_topk_, 4),
                    }
                )
                copy, plain, plain_rows, ours, ours_rows = (t.median for t in times.values())
                with without_kernels():
                    times |= self.time({"bisection": lambda: projected(project_topk_)})
                return {
                    **times,
                    "topk / ours, less the copy": f"{(plain - copy) / (ours - copy):.1f} ×",
                    "with minimum": f"{(plain_rows - copy) / (ours_rows - copy):.1f} ×",
                }

            yield case | {"kept": f"1/{round(1 / density)}"} | _or_error(measure)

    def projection_variants(self) -> Iterator[dict]:
        from hf_circuit_sparsity.kernels.gpu import TritonKernels

        model = _Matrices(self, 1024, 1 / 64)
        for block, warps in PROGRAMS:

            def measure(block=block, warps=warps) -> dict:
                kernels = TritonKernels(block=block, warps=warps)
                matrices = [m.view(len(m), -1) for m in model.scratch]
                return self.time(
                    {
                        "copy, in each": model.fresh,
                        "ours": lambda: model.together(
                            lambda _, *settings: kernels.project_(matrices, *settings)
                        ),
                    }
                )

            yield {"block": block, "warps": warps} | _or_error(measure)

    def profile(self) -> str:
        """What each launch takes, by the profiler."""
        from torch.profiler import ProfilerActivity, profile

        lines = []
        for width in (1024, 2048):
            model = _Matrices(self, width, 1 / 64)
            try:
                model.together(project_topk_each_)
                torch.cuda.synchronize()
                with profile(activities=[ProfilerActivity.CUDA]) as seen:
                    project_topk_each_(model.scratch, *model.settings)
                    torch.cuda.synchronize()
                took: dict[str, float] = {}
                for event in seen.events():
                    if event.device_type == torch.autograd.DeviceType.CUDA:
                        name = event.name[:40]
                        took[name] = took.get(name, 0.0) + event.time_range.elapsed_us()
                launches = "; ".join(f"{name} {us:.0f}" for name, us in took.items())
                lines.append(f"d_model {width}, {sum(took.values()):.0f} µs: {launches}")
            except Exception as error:
                lines.append(_message(error))
        return "\n\n".join(lines)


class _Matrices:
    """Random ones of the shapes of a model of 8 layers, and what is to be kept of each."""

    def __init__(self, bench: _Bench, width: int, density: float):
        config = CircuitGPTConfig(
            n_layer=8, d_model=width, d_head=16, block_size=256, vocab_size=2048
        )
        with torch.device("meta"):
            groups = sparse_param_groups(CircuitGPTForCausalLM(config))
        shapes = [
            (p.shape, group["min_nonzeros"] if p.dim() > 1 else 0)
            for group in groups
            if group["sparse"]
            for _, p in group["params"]
        ]
        self.weights = [bench.random(*shape, dtype=torch.float32) for shape, _ in shapes]
        self.scratch = [torch.empty_like(weight) for weight in self.weights]
        budgets = [nonzero_budget(weight.numel(), density) for weight in self.weights]
        self.settings = budgets, [minimum for _, minimum in shapes], [0] * len(shapes)

    def fresh(self) -> None:
        torch._foreach_copy_(self.scratch, self.weights)

    def one_by_one(self, project: Callable) -> None:
        self.fresh()
        for case in zip(self.scratch, *self.settings[:2], strict=True):
            project(*case)

    def together(self, project: Callable) -> None:
        self.fresh()
        project(self.scratch, *self.settings)

    def __str__(self) -> str:
        return f"{len(self.weights)} of {sum(w.numel() for w in self.weights):,} entries"


def graphed(call: Callable[[], object], calls: int) -> Callable[[], None]:
    """So many calls as one graph, which is replayed."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    return graph.replay


def _table(rows: Iterator[dict]) -> str:
    """Of the cases that went well; what became of the others is said below."""
    rows = list(rows)
    failed = [", ".join(map(str, row.values())) for row in rows if "error" in row]
    return "\n\n".join([table([row for row in rows if "error" not in row]), *failed])


def _same(got: torch.Tensor, expected: torch.Tensor) -> None:
    if not torch.equal(got, expected):
        raise AssertionError(f"{int((got != expected).sum())} of {got.numel()} entries differ")


def _or_error(measure: Callable[[], dict]) -> dict:
    try:
        return measure()
    except Exception as error:
        return {"error": _message(error)}


def _message(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".replace("\n", " ").replace("|", "/")[:300]


def _rate(nbytes: int, timing) -> str:
    return f"{nbytes / timing.median / 1e12:.2f} TB/s"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    main(run, __doc__, "gpu_kernels")
