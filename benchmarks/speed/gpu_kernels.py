"""Selection on a GPU by Triton, against `torch.topk`: AbsTopK and the projection, and variants.

Every case is first held against the plain path on the device; what fails says so in its row and
the others go on.
"""

import itertools
import time
from collections.abc import Callable, Iterator

import torch

from hf_circuit_sparsity.kernels.cpu import load_triton_kernels, without_kernels
from hf_circuit_sparsity.modeling.functional import abs_topk, abs_topk_reference
from hf_circuit_sparsity.optim.projection import project_topk_, project_topk_reference_

from ..experiment import Experiment, table
from .plain import abs_topk_plain, project_plain_
from .timing import interleaved, main, ratio

SHAPES = ((2048, 1024), (2048, 2048), (2048, 4096), (256, 16384))
MATRICES = ((1024, 4096), (4096, 1024), (8192, 2048))
DTYPES = (torch.float32, torch.bfloat16)
DENSITIES = (1 / 64, 1 / 2)
# Entries that a thread holds of a row; entries and warps of a program that reads a matrix.
PER_THREAD = (8, 16, 64)
PROGRAMS = ((2048, 4), (4096, 4), (8192, 8), (16384, 16))


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
        ("Projection", bench.projection),
        ("Launches of one projection", bench.profile),
        ("Variants of the projection", bench.projection_variants),
        ("Variants of AbsTopK", bench.abs_topk_variants),
    ):
        start = time.perf_counter()
        text = section() if title.startswith("Launches") else _table(section())
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
                return {
                    **times,
                    "forward": ratio(plain, ours),
                    "both": ratio(plain_both, ours_both),
                    "of a copy's bandwidth": _rate(2 * up.nbytes, ours),
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

        weight = self.random(8192, 2048, dtype=torch.float32)
        scratch, k = torch.empty_like(weight), weight.numel() // 64
        for block, warps in PROGRAMS:

            def measure(block=block, warps=warps) -> dict:
                kernels = TritonKernels(block=block, warps=warps)

                def project(minimum: int) -> None:
                    scratch.copy_(weight)
                    kernels.project_([scratch], [k], [minimum], [0])

                return self.time(
                    {
                        "copy, in each": lambda: scratch.copy_(weight),
                        "ours": lambda: project(0),
                        "ours + minimum 4": lambda: project(4),
                    }
                )

            yield {"block": block, "warps": warps} | _or_error(measure)

    def profile(self) -> str:
        """What each launch takes, by the profiler."""
        from torch.profiler import ProfilerActivity, profile

        lines = []
        for dtype, minimum in itertools.product(DTYPES, (0, 4)):
            weight = self.random(8192, 2048, dtype=dtype)
            k = weight.numel() // 64
            try:
                project_topk_(weight.clone(), k, minimum)
                torch.cuda.synchronize()
                with profile(activities=[ProfilerActivity.CUDA]) as seen:
                    project_topk_(weight, k, minimum)
                    torch.cuda.synchronize()
                events = [(e.name[:40], e.time_range.elapsed_us()) for e in seen.events()]
                launches = [f"{name} {took:.1f}" for name, took in events]
                lines.append(f"{_short(dtype)}, minimum {minimum}, µs: " + "; ".join(launches))
            except Exception as error:
                lines.append(_message(error))
        return "\n\n".join(lines)


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
