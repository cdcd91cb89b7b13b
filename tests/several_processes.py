"""Ranks that are forked from a test, so that none has to import everything again."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accelerate.state import AcceleratorState


def on_ranks(work: Callable[..., Any], size: int, folder: Path, *arguments: Any) -> list[Any]:
    """What `work(rank, size, *arguments)` returned on each rank: of what torch loads as weights."""
    folder.mkdir(parents=True, exist_ok=True)
    mp.start_processes(
        _rank, (size, str(folder), work, arguments), nprocs=size, start_method="fork"
    )
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(size)]


def _rank(rank: int, size: int, folder: str, work: Callable[..., Any], arguments: Any) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size), "ACCELERATE_USE_CPU": "1",
    }  # fmt: skip
    AcceleratorState._reset_state(reset_partial_state=True)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
    try:
        torch.save(work(rank, size, *arguments), f"{folder}/rank{rank}.pt")
    finally:
        dist.destroy_process_group()
