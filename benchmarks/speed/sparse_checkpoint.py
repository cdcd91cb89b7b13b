"""Checkpoints of the nonzeros: size, time to load and peak memory, against dense ones."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from hf_circuit_sparsity.modeling.configuration_circuitgpt import CircuitGPTConfig
from hf_circuit_sparsity.modeling.modeling_circuitgpt import CircuitGPTForCausalLM

from .measure import interleaved, main, ratio, table
from .plain import random_sparse_model

# In a process of its own, as the peak is the process's. Linux lets one reset it (proc(5)).
_PEAK = """
import json, sys
import torch
from hf_circuit_sparsity.modeling import CircuitGPTForCausalLM
from transformers.utils import logging
logging.disable_progress_bar()
def memory(kind):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(kind))
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before = memory("VmRSS")
folder, options = sys.argv[1], json.loads(sys.argv[2])
model = CircuitGPTForCausalLM.from_pretrained(folder, **options)
loading = memory("VmHWM") - before
with torch.no_grad():
    model(torch.arange(8)[None])
print(json.dumps([loading, memory("VmHWM") - before]))
"""


def _peak(folder: Path, options: dict[str, bool]) -> tuple[str, str]:
    """Peak memory above the start's, in MB: of loading, and with a forward pass after it."""
    if not Path("/proc/self/clear_refs").exists():
        return "not known here", "not known here"
    done = subprocess.run(
        [sys.executable, "-c", _PEAK, str(folder), json.dumps(options)],
        capture_output=True,
        text=True,
        check=True,
    )
    loading, used = json.loads(done.stdout)
    return f"{loading / 1e6:.0f}", f"{used / 1e6:.0f}"


def run(device: str, dtype: torch.dtype, quick: bool) -> str:
    """The table. Loading is into the CPU's memory whatever the device."""
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

        @torch.no_grad()
        def load(folder: Path, options: dict[str, bool], use: bool) -> None:
            loaded = CircuitGPTForCausalLM.from_pretrained(folder, **options)
            if use:  # a dense file is only mapped when loaded, and read when used
                loaded(torch.arange(8)[None])

        rounds = 2 if quick else 3
        times, used = (
            interleaved({n: lambda w=w, u=u: load(*w, u) for n, w in ways.items()}, rounds)
            for u in (False, True)
        )
        sizes = {n: sum(f.stat().st_size for f in p.iterdir()) for n, p in folders.items()}
        lines = []
        for name, (folder, options) in ways.items():
            size = sizes["sparse" if folder is folders["sparse"] else "dense"]
            lines.append(
                (
                    name,
                    f"{size / 1e6:.1f}",
                    f"{sizes['dense'] / size:.0f} ×",
                    times[name],
                    used[name],
                    ratio(used["dense file, run dense"], used[name]),
                    *_peak(folder, options),
                )
            )
    header = (
        "checkpoint",
        "folder (MB)",
        "dense / this",
        "load (ms)",
        "load and first logits",
        "dense / this",
        "peak memory of loading (MB)",
        "after a first forward pass",
    )
    return (
        ("The released shape at 1 in 1000 nonzero, " if not quick else "A small model, ")
        + f"{dtype}; the folder holds the model's code too.\n\n"
        + table(header, lines)
    )


if __name__ == "__main__":
    main(__doc__, run)
