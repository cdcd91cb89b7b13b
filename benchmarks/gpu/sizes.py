"""The sizes of a run, and what its stages share: the data, the device, and where results go."""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from hf_circuit_sparsity.files import replacing
from hf_circuit_sparsity.modeling.configuration_circuitgpt import CircuitGPTConfig


@dataclass(frozen=True)
class Size:
    """How large the model is, and how long each stage may take, in seconds."""

    d_model: int = 1024
    n_layer: int = 8
    block_size: int = 256
    batch_size: int = 32
    timed_steps: int = 40
    train_seconds: float = 240
    validation_blocks: int = 2048
    task_prompts: int = 512
    circuit_tasks: int = 3
    mask_steps: int = 200
    speed_widths: tuple[int, ...] = (1024, 2048)
    speed_batch: int = 16
    speed_seconds: float = 85

    def config(self, vocab_size: int, eos_token_id: int | None = None) -> CircuitGPTConfig:
        """The model's."""
        return CircuitGPTConfig(
            d_model=self.d_model,
            n_layer=self.n_layer,
            d_head=16,
            block_size=self.block_size,
            vocab_size=vocab_size,
            eos_token_id=eos_token_id,
        )


SIZES = {
    "full": Size(),
    # All of it, to find errors before the time is spent.
    "smoke": Size(
        timed_steps=12,
        train_seconds=8,
        validation_blocks=256,
        task_prompts=64,
        circuit_tasks=1,
        mask_steps=10,
        speed_widths=(1024,),
        speed_seconds=20,
    ),
    # For a test on a CPU; below 128 tokens some tasks do not fit.
    "rehearsal": Size(
        d_model=96,
        n_layer=2,
        block_size=128,
        batch_size=4,
        timed_steps=4,
        train_seconds=3,
        validation_blocks=8,
        task_prompts=8,
        circuit_tasks=1,
        mask_steps=3,
        speed_widths=(64,),
        speed_batch=2,
        speed_seconds=10,
    ),
}


def compile_mode(device: str) -> str | None:
    """How blocks are compiled for training: on CUDA their launches are recorded and replayed."""
    return "reduce-overhead" if device == "cuda" else None


class TokenBlocks(Dataset):
    """A token file, uint16, as blocks of equal length for a `Trainer`; read as it is asked for."""

    def __init__(self, path: Path, block_size: int) -> None:
        tokens = np.memmap(path, np.uint16, mode="r")
        self.blocks = tokens[: len(tokens) // block_size * block_size].reshape(-1, block_size)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        block = torch.from_numpy(self.blocks[index].astype(np.int64))
        return {"input_ids": block, "labels": block}

    def spread(self, most: int) -> torch.Tensor:
        """About `most` blocks spread evenly over the file, `(n, block_size)` int64."""
        rows = self.blocks[:: max(1, len(self.blocks) // most)][:most]
        return torch.from_numpy(rows.astype(np.int64))


def stage_arguments(description: str | None) -> argparse.ArgumentParser:
    """The options that every stage has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--work", type=Path, required=True, help="folder of results and model")
    parser.add_argument("--data", type=Path, default=Path("gpu_data"), help="see corpus.py")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--device", default="cuda")
    return parser


def write_section(work: Path, name: str, text: str) -> None:
    """Write one section of the report, which is all of them in the order of their names."""
    with replacing(work / f"{name}.md") as temporary:
        temporary.write_text(text.rstrip() + "\n\n", encoding="utf-8")
    print(text, flush=True)
