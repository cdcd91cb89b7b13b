"""What keeping the largest weights of sharded matrices adds to a step: bytes and milliseconds."""

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hf_circuit_sparsity.modeling.configuration_circuitgpt import CircuitGPTConfig
from hf_circuit_sparsity.modeling.modeling_circuitgpt import CircuitGPTForCausalLM
from hf_circuit_sparsity.optim.param_groups import sparse_param_groups as groups_of
from hf_circuit_sparsity.optim.topk_adamw import TopKAdamW

from ..experiment import Experiment, machine, table

DENSITY = 1 / 64
WHOLE = "top-k AdamW, not sharded"


@contextmanager
def _counted() -> Iterator[list[int]]:
    """The bytes that every collective within is handed, one entry each."""
    sent: list[int] = []
    all_reduce, all_gather = dist.all_reduce, dist.all_gather

    def reduce(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.append(tensor.numel() * tensor.element_size())
        return all_reduce(tensor, *args, **kwargs)

    def gather(into: list[torch.Tensor], tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.append(tensor.numel() * tensor.element_size())
        return all_gather(into, tensor, *args, **kwargs)

    dist.all_reduce, dist.all_gather = reduce, gather
    try:
        yield sent
    finally:
        dist.all_reduce, dist.all_gather = all_reduce, all_gather


def _rank(rank: int, size: int, folder: str, width: int, layers: int, steps: int) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store{size}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
    mesh = init_device_mesh("cpu", (size,))
    config = CircuitGPTConfig(
        n_layer=layers, d_model=width, d_head=16, block_size=64, vocab_size=2048
    )
    sides = {}
    for name in (WHOLE, "AdamW", "top-k AdamW")[size > 1 :]:
        torch.manual_seed(0)
        model = CircuitGPTForCausalLM(config)
        if name != WHOLE:
            fully_shard(model, mesh=mesh)
        if name == "AdamW":
            sides[name] = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        else:
            schedule = {"target_density": DENSITY, "anneal_start": 0, "anneal_end": 0}
            sides[name] = TopKAdamW(groups_of(model), lr=1e-3, **schedule)
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(steps + 2):
        for name, optimizer in sides.items():
            for group in optimizer.param_groups:
                for p in group["params"]:
                    p.grad = torch.randn_like(p)
            dist.barrier()
            with _counted() as sent:
                started = time.process_time()
                optimizer.step()
                times[name].append(time.process_time() - started)
    sparse = [p for g in optimizer.param_groups if g["sparse"] for p in g["params"]]
    if rank == 0:
        figures = {name: median(seconds[2:]) for name, seconds in times.items()}
        figures |= {"bytes": sum(sent), "collectives": len(sent), "tensors": len(sparse)}
        figures["entries"] = sum(p.numel() for p in sparse)
        torch.save(figures, f"{folder}/{size}.pt")
    dist.destroy_process_group()


def run(experiment: Experiment) -> str:
    """Both sides in turn, on one rank and on several."""
    options, rows = experiment.options, []
    with tempfile.TemporaryDirectory() as folder:
        for size in (1, options.ranks):
            arguments = (size, folder, options.width, options.layers, options.steps)
            mp.spawn(_rank, arguments, nprocs=size)
            found = torch.load(Path(folder, f"{size}.pt"), weights_only=True)
            plain, ours = found["AdamW"], found["top-k AdamW"]
            rows.append(
                {
                    "ranks": size,
                    WHOLE: f"{found[WHOLE] * 1e3:.0f}" if WHOLE in found else "",
                    "AdamW": f"{plain * 1e3:.0f}",
                    "top-k AdamW": f"{ours * 1e3:.0f}",
                    "added": f"{(ours - plain) * 1e3:.0f}",
                    "added messages": found["collectives"],
                    "added bytes a rank hands over": f"{found['bytes']:,}",
                }
            )
    return (
        f"{machine()}\n\nThe optimizer's step alone, gloo, float32, CircuitGPT, d_model "
        f"{options.width}, {options.layers} layers: {found['tensors']} sparse tensors of "
        f"{found['entries']:,} entries in all, density 1/64; milliseconds of a rank's own CPU "
        f"time, which waiting is not part of, median of {options.steps} steps, all sides in turn."
        f"\n\n{table(rows)}"
    )


if __name__ == "__main__":
    Experiment.main(
        run, __doc__, "sharded_topk", "runs/sharded", width=512, layers=4, ranks=2, steps=15
    )
