"""Checkpoints of the nonzeros: size, time to load and peak memory, against dense ones."""

import tempfile
from pathlib import Path
from typing import Any

import torch

from hf_circuit_sparsity.modeling.configuration_circuitgpt import CircuitGPTConfig
from hf_circuit_sparsity.modeling.modeling_circuitgpt import CircuitGPTForCausalLM

from ..experiment import Experiment, in_new_process, table
from .plain import random_sparse_model
from .timing import interleaved, main, ratio, settings


@torch.no_grad()
def load(folder: Path, options: dict[str, Any], use: bool) -> None:
    """Load a model; a dense file is only mapped by that, and read when the model is used."""
    model = CircuitGPTForCausalLM.from_pretrained(folder, **options)
    if use:
        model(torch.arange(8)[None])


def peaks(folder: Path, options: dict[str, Any]) -> tuple[int, int] | None:
    """Bytes that loading adds to the memory of this process, and that with a forward pass.

    Linux lets a process reset its peak (proc(5)); None where that cannot be done.
    """
    if not Path("/proc/self/clear_refs").exists():
        return None

    def memory(kind: str) -> int:
        with open("/proc/self/status", encoding="utf-8") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith(kind))

    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    model = CircuitGPTForCausalLM.from_pretrained(folder, **options)
    loading = memory("VmHWM") - before
    with torch.no_grad():
        model(torch.arange(8)[None])
    return loading, memory("VmHWM") - before


def run(experiment: Experiment) -> str:
    """The table. Loading is into the CPU's memory whatever the device."""
    _, dtype, quick = settings(experiment)
    config = CircuitGPTConfig(n_layer=2, d_model=256, vocab_size=512) if quick else None
    model = random_sparse_model(config or CircuitGPTConfig(), 1e-3, "cpu", dtype)
    with tempfile.TemporaryDirectory() as root:
        folders = {"dense": Path(root) / "dense", "sparse": Path(root) / "sparse"}
        for name, folder in folders.items():
            model.save_pretrained(folder, sparse=name == "sparse")
        del model
        ways = {
            "dense file, run dense": (folders["dense"], {}),
            "sparse file, run dense": (folders["sparse"], {}),
            "dense file, run on the nonzeros": (folders["dense"], {"sparse": True}),
            "sparse file, run on the nonzeros": (folders["sparse"], {"sparse": True}),
        }

        rounds = 2 if quick else 3
        times, used = (
            interleaved({n: lambda w=w, u=u: load(*w, u) for n, w in ways.items()}, rounds)
            for u in (False, True)
        )
        sizes = {n: sum(f.stat().st_size for f in p.iterdir()) for n, p in folders.items()}
        rows = []
        for name, (folder, options) in ways.items():
            size = sizes["sparse" if folder is folders["sparse"] else "dense"]
            peak = in_new_process(peaks, folder, options)
            loading, after = [f"{x / 1e6:.0f}" for x in peak] if peak else ["not known here"] * 2
            rows.append(
                {
                    "checkpoint": name,
                    "folder (MB)": f"{size / 1e6:.1f}",
                    "dense / this": f"{sizes['dense'] / size:.0f} ×",
                    "load (ms)": times[name],
                    "load and first logits": used[name],
                    "dense / this, first logits": ratio(used["dense file, run dense"], used[name]),
                    "peak memory of loading (MB)": loading,
                    "after a first forward pass": after,
                }
            )
    return (
        "The released shape at 1 in 1000 nonzero, " if not quick else "A small model, "
    ) + f"{dtype}; the folder holds the model's code too.\n\n{table(rows)}"


if __name__ == "__main__":
    main(run, __doc__, "sparse_checkpoint")
