"""What every experiment shares: options, stored results, a report and pictures."""

import argparse
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers

from hf_circuit_sparsity.commands.console import quiet_libraries
from hf_circuit_sparsity.files import replacing, save_figure
from hf_circuit_sparsity.kernels.cpu import load_kernels

RESULTS = Path("benchmarks/results")


class Experiment:
    """One experiment: its options, and where its results are stored and reported.

    Args:
        name: of the report and the pictures.
        folder: for models, data and stored results; an interrupted experiment resumes from it.
        results: folder of the report and the pictures.
        stored_only: report on what is stored; measure nothing.
        options: the experiment's own.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        results: Path = RESULTS,
        stored_only: bool = False,
        **options: Any,
    ) -> None:
        self.name, self.folder, self.results = name, folder, results
        self.stored_only = stored_only
        self.options = SimpleNamespace(**options)

    @classmethod
    def main(
        cls,
        run: Callable[["Experiment"], str],
        description: str | None,
        name: str,
        folder: str,
        results: str | Path = RESULTS,
        **options: Any,
    ) -> None:
        """The command line of an experiment: runs it, then prints and writes its report.

        Args:
            run: returns the report's Markdown.
            description: what `--help` says.
            name: the report's file name.
            folder: default of `--folder`.
            results: default of `--results`.
            options: more options and their defaults; a tuple's takes several values.
        """
        parser = argparse.ArgumentParser(description=description)
        common = {"name": name, "folder": Path(folder), "results": Path(results)}
        for option, default in {**common, "stored_only": False, **options}.items():
            several = isinstance(default, tuple)
            kind: dict[str, Any] = {"type": type((default or ("",))[0] if several else default)}
            if default is False:
                kind = {"action": "store_true"}
            elif several:
                kind["nargs"] = "*"
            flag = "--" + option.replace("_", "-")
            parser.add_argument(flag, default=default, help="(default: %(default)s)", **kind)
        quiet_libraries()
        experiment = cls(**vars(parser.parse_args()))
        experiment.write(run(experiment))

    def write(self, text: str) -> Path:
        """Print a report and write it into the results."""
        path = self.results / f"{self.name}.md"
        with replacing(path) as temporary:
            temporary.write_text(text.rstrip() + "\n", encoding="utf-8")
        print(text, flush=True)
        return path

    def picture(
        self,
        draw: Callable[[Any], None],
        title: str,
        size: tuple[float, float] = (5.5, 4),
        dpi: int = 150,
        **subplots: Any,
    ) -> str:
        """Draw the report's picture beside it.

        Args:
            draw: called with the axes, or their array where there are several.
            title: what a reader without pictures sees.
            size: in inches.
            dpi: dots per inch.
            subplots: of `Figure.subplots`.

        Returns:
            The Markdown that shows the picture.
        """

        def figure(make: type) -> Any:
            made = make(figsize=size, layout="constrained")
            draw(made.subplots(**subplots))
            return made

        path = save_figure(self.results / f"{self.name}.png", figure, dpi=dpi)
        return f"![{title}]({path.name})"


def stored(path: Path, compute: Callable[[], Any]) -> Any:
    """What `compute` returned when it was first called for this file; JSON values only."""
    if not path.is_file():
        result = compute()
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """A Markdown table of rows that have the same keys, which are its header."""
    header = list(rows[0]) if rows else ["nothing measured"]
    lines = [header, ["---"] * len(header), *([row[name] for name in header] for row in rows)]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean."""
    return sum(values) / len(values)


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean and standard deviation, as a table shows them."""
    if not values:
        return "–"
    variance = mean([v**2 for v in values]) - mean(values) ** 2
    return f"{mean(values):.{digits}f} ± {max(0.0, variance) ** 0.5:.{digits}f}"


def grouped(
    rows: Sequence[Mapping[str, Any]], *keys: str
) -> dict[tuple[Any, ...], list[Mapping[str, Any]]]:
    """The rows by what they have under these keys, in the order they come in."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


def in_new_process(function: Callable[..., Any], *args: Any) -> Any:
    """Call a module's function in a process of its own, so that its peak memory is its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def peak_memory() -> int:
    """Bytes of memory that this process has had at most.

    Where the system says so (Linux), of this program alone: what `getrusage` counts is inherited
    from the process that started it.
    """
    try:
        with open("/proc/self/status", encoding="utf-8") as status:
            return next(1024 * int(x.split()[1]) for x in status if x.startswith("VmHWM"))
    except (OSError, StopIteration):
        import resource

        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def machine(device: str = "cpu") -> str:
    """What the figures were measured on, in one line."""
    kernels = "with" if load_kernels() else "without"
    chip = torch.cuda.get_device_name() if device.startswith("cuda") else _processor()
    return (
        f"{chip}, {torch.get_num_threads()} CPU thread(s), torch {torch.__version__}, "
        f"transformers {transformers.__version__}, numpy {np.__version__}, {kernels} "
        "compiled CPU kernels"
    )


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = {line.split(":")[1].strip() for line in file if line.startswith("model name")}
    except OSError:
        names = set()
    return ", ".join(sorted(names)) or platform.processor() or platform.machine()
