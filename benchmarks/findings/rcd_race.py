"""Trainings that take turns, each with its own clock: how optimizers are compared fairly.

The `Trainer` has neither: its trainings run to their ends, and its clock counts evaluations.
"""

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from hf_circuit_sparsity.commands.console import say
from hf_circuit_sparsity.files import replacing
from hf_circuit_sparsity.modeling.configuration_circuitgpt import CircuitGPTConfig
from hf_circuit_sparsity.modeling.modeling_circuitgpt import CircuitGPTForCausalLM
from hf_circuit_sparsity.modeling.sparse_layers import sparse_layers
from hf_circuit_sparsity.optim.param_groups import sparse_param_groups
from hf_circuit_sparsity.optim.rcd.optimizer import RCDSparseOptimizer
from hf_circuit_sparsity.optim.rcd.partial_gradients import PartialGradients
from hf_circuit_sparsity.optim.sparse_compute import on_nonzeros
from hf_circuit_sparsity.optim.sparse_init import sparse_from_config, sparsify_initialization_
from hf_circuit_sparsity.optim.topk_adamw import TopKAdamW
from hf_circuit_sparsity.tasks.corpus import build_corpus
from hf_circuit_sparsity.tasks.packing import pack_dataset
from hf_circuit_sparsity.tasks.tokenizer import train_tokenizer
from hf_circuit_sparsity.trainer.bigram_init import initialize_bigram_table_

from .mask_methods import METHODS, keep_at_density

MIN_NONZEROS = 4


@dataclass(frozen=True)
class Run:
    """The optimizer and the length of one training.

    Args:
        method: "topk", "rcd", one of `mask_methods`, or without any sparsity "adamw" or "sgd".
        steps: optimizer steps.
        lr: peak learning rate; linear warm-up over 1 % of the steps, then linear decay.
        batch: sequences per step.
        settings: of the optimizer, beside those of the recipe of Gao et al. 2025, section 2.
        seed: of initialization, order of the data and blocks.
    """

    method: str
    steps: int
    lr: float
    batch: int
    settings: dict[str, Any] = field(default_factory=dict)
    seed: int = 0


def tokens(folder: Path, vocabulary: int, context: int) -> dict[str, torch.Tensor]:
    """Packed blocks of the standard library, int64 `(n, context)`, made once per folder."""
    names = ("train", "validation")
    files = {name: folder / f"{name}-{vocabulary}-{context}.npy" for name in names}
    if not all(file.is_file() for file in files.values()):
        corpus = build_corpus()
        tokenizer = train_tokenizer(corpus["train"], vocab_size=vocabulary)
        for name, file in files.items():
            blocks = pack_dataset(corpus[name], tokenizer, context)["input_ids"]
            with replacing(file) as temporary:
                np.save(temporary, np.array(blocks, dtype=np.uint16))
    return {name: torch.from_numpy(np.load(file).astype(np.int64)) for name, file in files.items()}


def spread(blocks: torch.Tensor, count: int) -> torch.Tensor:
    """Rows spread evenly over the blocks: neighbouring ones come from the same file."""
    return blocks[:: max(1, len(blocks) // count)][:count]


def builders(
    config: CircuitGPTConfig, counted: torch.Tensor | None, seed: int = 0
) -> tuple[Callable[[], CircuitGPTForCausalLM], Callable[[float], CircuitGPTForCausalLM]]:
    """What [`Training`] builds a dense and a sparse CircuitGPT with.

    Args:
        counted: tokens whose bigram counts both begin with; None to begin without.
        seed: of the sparse one.
    """

    def begun(model: CircuitGPTForCausalLM) -> CircuitGPTForCausalLM:
        if counted is not None:
            initialize_bigram_table_(model, counted)
        return model

    return (
        lambda: begun(CircuitGPTForCausalLM(config)),
        lambda density: begun(sparse_from_config(config, density, seed=seed)),
    )


def sparse_optimizer(
    model: nn.Module, run: Run, density: float
) -> tuple[torch.optim.Optimizer, AbstractContextManager[Any]]:
    """The optimizer of a run, and the context in which the model computes as it needs."""
    groups = sparse_param_groups(model, min_nonzeros=MIN_NONZEROS)
    if run.method in ("adamw", "sgd"):
        plain = [{"params": [p for _, p in g["params"]], "weight_decay": g["weight_decay"]}
                 for g in groups]  # fmt: skip
        kind = torch.optim.AdamW if run.method == "adamw" else torch.optim.SGD
        return kind(plain, lr=run.lr, **run.settings), nullcontext()
    common = {
        "lr": run.lr,
        "betas": (0.9, 0.95),
        "eps": 0.1,
        "target_density": density,
        "total_steps": run.steps,
        "sharkfin": True,
        "normalize_gradients": "always",
        **run.settings,
    }
    if run.method == "topk":
        return TopKAdamW(groups, **common), on_nonzeros(model)
    if run.method in METHODS:
        never = {"target_density": 1.0, "anneal_start": 0.0, "anneal_end": 0.0, "sharkfin": False}
        optimizer = TopKAdamW(groups, **{**common, **never})
        sparse = [group for group in optimizer.param_groups if group["sparse"]]
        rows = {p: group["row_dim"] for group in sparse for p in group["params"]}
        prune = keep_at_density(MIN_NONZEROS, rows)
        METHODS[run.method](optimizer, list(rows), density, run.steps, prune)
        return optimizer, nullcontext()
    optimizer = RCDSparseOptimizer(groups, seed=run.seed, **common)
    return optimizer, PartialGradients(model, optimizer)


class Training:
    """A training with a clock of its own, which stands still while others run or it is evaluated.

    Args:
        build: makes the model.
        build_sparse: makes it with so small a density, as nonzeros alone, where that is how random
            coordinate descent is to begin.
        blocks: training tokens, int64 `(n, context)`.
        held_out: validation tokens, int64 `(n, context)`.

    Attributes:
        curve: per evaluation: step, tokens, seconds (wall), cpu_seconds, loss (nats per token).
    """

    def __init__(
        self,
        build: Callable[[], PreTrainedModel],
        run: Run,
        density: float,
        blocks: torch.Tensor,
        held_out: torch.Tensor,
        build_sparse: Callable[[float], PreTrainedModel] | None = None,
    ) -> None:
        self.plan, self.blocks, self.held_out = run, blocks, held_out
        self.done, self.seconds, self.cpu_seconds = 0, 0.0, 0.0
        self.curve: list[dict[str, float]] = []
        torch.manual_seed(run.seed)
        start = run.settings.get("start_density") or density
        if run.method == "rcd" and build_sparse is not None:
            self.model = build_sparse(start)
        else:
            self.model = build()
            if run.method == "rcd":
                sparsify_initialization_(
                    self.model, start, min_nonzeros=MIN_NONZEROS, seed=run.seed
                )
        self.optimizer, self._computing = sparse_optimizer(self.model, run, density)
        self._computing.__enter__()
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._factor)
        generator = torch.Generator().manual_seed(run.seed)
        self.order = torch.randperm(len(blocks), generator=generator)

    def _factor(self, step: int) -> float:
        warmup = max(1, round(0.01 * self.plan.steps))
        left = (self.plan.steps - step) / (self.plan.steps - warmup + 1)
        return max(0.0, min((step + 1) / warmup, left))

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return self.done >= self.plan.steps

    def run(self, steps: int) -> float:
        """Train for at most so many steps more; returns the mean training loss."""
        self.model.train()
        losses = []
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(min(steps, self.plan.steps - self.done)):
            first = self.done * self.plan.batch
            rows = torch.arange(first, first + self.plan.batch) % len(self.order)
            batch = self.blocks[self.order[rows]]
            loss = self.model(batch, labels=batch, use_cache=False).loss
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
            self.done += 1
            losses.append(loss.item())
        self.seconds += time.perf_counter() - wall
        self.cpu_seconds += time.process_time() - cpu
        return sum(losses) / len(losses)

    @torch.no_grad()
    def evaluate(self) -> float:
        """Validation loss in nats per token; adds a point to the curve."""
        self.model.eval()
        total = 0.0
        for piece in self.held_out.split(16):
            total += self.model(piece, labels=piece, use_cache=False).loss.item() * len(piece)
        loss = total / len(self.held_out)
        self.curve.append(
            {
                "step": self.done,
                "tokens": self.done * self.plan.batch * self.blocks.shape[1],
                "seconds": self.seconds,
                "cpu_seconds": self.cpu_seconds,
                "loss": loss,
            }
        )
        return loss

    def close(self) -> None:
        """Give the model's layers back their own ways to compute."""
        self._computing.__exit__(None, None, None)

    def nonzeros(self) -> tuple[int, int]:
        """Nonzeros, and entries, of the parameters that are sparse by the paper's rule."""
        groups = [g for g in sparse_param_groups(self.model) if g["sparse"]]
        sparse = [p for g in groups for _, p in g["params"]]
        sizes = {id(m.values): math.prod(m.shape) for m in sparse_layers(self.model).values()}
        entries = sum(sizes.get(id(p), p.numel()) for p in sparse)
        return sum(int(torch.count_nonzero(p)) for p in sparse), entries

    def save(self, path: Path) -> None:
        """Write all that [`Training.load`] needs, to a temporary name first."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "clock": [self.done, self.seconds, self.cpu_seconds],
            "curve": self.curve,
        }
        with replacing(path) as temporary:
            torch.save(state, temporary)

    def load(self, path: Path) -> None:
        """Go on where [`Training.save`] left."""
        saved = torch.load(path, weights_only=True)
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        saved["schedule"]["lr_lambdas"] = [None] * len(self.optimizer.param_groups)
        self.schedule.load_state_dict(saved["schedule"])
        self.done, self.seconds, self.cpu_seconds = saved["clock"]
        self.curve = saved["curve"]


def race(
    trainings: dict[str, Training],
    folder: Path,
    turn_seconds: float,
    evaluations: int,
) -> None:
    """Run all trainings to their ends, in turns of equal length, each evaluated as often.

    What a turn on a shared machine is disturbed by so falls on all alike. After every round all are
    saved to `folder`; a race whose folder has such files goes on from there.
    """
    files = {name: folder / f"{name}.pt" for name in trainings}
    for name, training in trainings.items():
        if files[name].is_file():
            training.load(files[name])
            say(f"{name}: going on at step {training.done}")
    while not all(t.finished for t in trainings.values()):
        for name, training in trainings.items():
            if training.finished:
                continue
            every = max(1, training.plan.steps // evaluations)
            until = training.seconds + turn_seconds
            while training.seconds < until and not training.finished:
                train_loss = training.run(every - training.done % every)
                loss = training.evaluate()
                say(
                    f"{name}: step {training.done}/{training.plan.steps}, "
                    f"{training.seconds:.0f} s, training loss {train_loss:.3f}, "
                    f"validation {loss:.4f}"
                )
            training.save(files[name])


def seconds_to(curve: list[dict[str, float]], loss: float, clock: str = "seconds") -> float | None:
    """When a curve first was at or below a loss, between evaluations by interpolation."""
    before = None
    for point in curve:
        if point["loss"] <= loss:
            if before is None:
                return point[clock]
            share = (before["loss"] - loss) / (before["loss"] - point["loss"])
            return before[clock] + share * (point[clock] - before[clock])
        before = point
    return None


def bigram_loss(
    blocks: torch.Tensor, held_out: torch.Tensor, vocabulary: int
) -> tuple[float, float]:
    """Loss of the best smoothed table of bigram counts, and the smoothing, chosen on the held-out.

    Counts are smoothed with `smoothing` pseudo-counts spread as the single tokens are.
    """
    pairs = blocks[:, :-1] * vocabulary + blocks[:, 1:]
    counts = pairs.flatten().bincount(minlength=vocabulary**2).view(vocabulary, vocabulary).double()
    single = blocks.flatten().bincount(minlength=vocabulary) + 1.0
    single /= single.sum()
    first, second = held_out[:, :-1], held_out[:, 1:]
    totals = counts.sum(1)[first]
    found, best = math.inf, 0.0
    for smoothing in (3.0, 10.0, 30.0, 100.0, 300.0, 1000.0):
        share = (counts[first, second] + smoothing * single[second]) / (totals + smoothing)
        loss = -share.log().mean().item()
        if loss < found:
            found, best = loss, smoothing
    return found, best
