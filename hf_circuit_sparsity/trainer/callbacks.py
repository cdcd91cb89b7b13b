"""What is watched during a training: Ctrl-C, the progress, the nonzeros."""

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from tqdm.auto import tqdm
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)

from ..modeling.sparse_layers import SparseWeight
from ..optim.sharding import local, shard_group


class InterruptCallback(TrainerCallback):
    """Makes Ctrl-C stop any `Trainer` after the current step, with a checkpoint to resume from.

    So does SIGTERM, which schedulers send. A second Ctrl-C raises `KeyboardInterrupt` at once. The
    callback handles both signals while training runs in the main thread, and hands them back at the
    end. It does not learn of a training that ends by an exception: call `restore` then.

    Attributes:
        interrupted (`bool`): whether the last training was stopped so.
        first_step (`int`): after which step it began, or was resumed; None if there was none.
    """

    def __init__(self) -> None:
        self.interrupted = False
        self.first_step: int | None = None
        self._previous: dict[int, Any] = {}
        self._saved = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.interrupted = self._saved = False
        self.first_step = state.global_step
        # Python takes signal handlers from the main thread only; elsewhere Ctrl-C stays as it is.
        if not self._previous and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._on_signal)

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        # An evaluation that is due at this very step still takes place: it draws random numbers, so
        # without it the resumed run would not be the one that never stopped.
        self._stop(control)

    def on_epoch_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        self._stop(control)
        if self.interrupted:
            control.should_evaluate = False  # the epoch did not end, it was cut short

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._saved = self.interrupted

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.restore()

    def restore(self) -> None:
        """Hand the signals back to whoever had them before the training. Idempotent."""
        for number, previous in self._previous.items():
            # None stands for a handler not set from Python, which Python cannot set again.
            signal.signal(number, signal.SIG_DFL if previous is None else previous)
        self._previous = {}

    def _stop(self, control: TrainerControl) -> None:
        if self.interrupted:
            control.should_training_stop = True
            control.should_save = not self._saved

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.interrupted:
            self.restore()
            raise KeyboardInterrupt
        self.interrupted = True
        message = "Stopping after this step and saving a checkpoint; Ctrl-C again to stop at once."
        print(f"\n{message}", file=sys.stderr, flush=True)


class ProgressTableCallback(TrainerCallback):
    """A progress bar, and a line about loss and density every time the `Trainer` logs.

    Args:
        tokens_per_step: of an optimizer step, for the speed.
        measure: called at every log; the cells it returns, by column, are added to the line.
    """

    def __init__(
        self, tokens_per_step: int, measure: Callable[[], dict[str, str]] | None = None
    ) -> None:
        self.tokens_per_step = tokens_per_step
        self.measure = measure
        self._bar: tqdm | None = None
        self._last_log = (0, 0.0)
        self._has_header = False

    @classmethod
    def replace_in(cls, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Put a table made with these arguments in the place of the trainer's own display."""
        for other in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(other)
        trainer.add_callback(cls(*args, **kwargs))

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc="training",
            unit="step",
            dynamic_ncols=True,
            file=sys.stderr,
            disable=not state.is_world_process_zero,
            # Where the output is a file, a bar that redraws itself is a line a second.
            mininterval=0.5 if sys.stderr.isatty() else 60,
        )
        self._last_log = (state.global_step, time.perf_counter())

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._bar.update(state.global_step - self._bar.n)

    def on_log(
        self,
        args: Any,
        state: TrainerState,
        control: Any,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not logs or "loss" not in logs:
            return
        step, then = self._last_log
        seconds = max(time.perf_counter() - then, 1e-9)
        cells = {
            "step": f"{state.global_step}/{state.max_steps}",
            "loss": f"{float(logs['loss']):.3f}",
            "density": f"{logs.get('nonzero_fraction', 1.0):.4f}",
            "nonzeros": f"{int(logs.get('nonzeros', 0)):,}",
            "churn": f"{logs.get('mask_churn', 0.0):.3f}",
            "tokens/s": f"{(state.global_step - step) * self.tokens_per_step / seconds:,.0f}",
        }
        if self.measure is not None:
            cells |= self.measure()
        self._last_log = (state.global_step, time.perf_counter())
        if self._bar.disable:
            return
        if not self._has_header:
            self._bar.write("  ".join(f"{name:>10}" for name in cells))
            self._has_header = True
        self._bar.write("  ".join(f"{value:>10}" for value in cells.values()))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar.close()


class SparsityMonitor:
    """Counts the nonzeros of parameters, and how many were zero at the last count.

    Works with any parameters, whatever optimizer trains them. Between counts it holds one bit per
    entry in main memory; of a layer that holds only its nonzeros, eight bytes per nonzero. Of a
    sharded parameter each process looks at its part, and all have to count together.

    Args:
        parameters: the tensors to watch, or layers that hold only their nonzeros.
    """

    def __init__(self, parameters: Iterable[Tensor | SparseWeight]) -> None:
        self.parameters = list(parameters)
        self._masks = [_mask(p) for p in self.parameters]

    def measure(self) -> dict[str, float]:
        """Count the nonzeros now and compare them with the last count, or with the first state.

        Returns:
            `nonzeros`: number of entries that are not zero. `nonzero_fraction`: their share of all,
            in [0, 1]. `mask_churn`: the share of them that were zero at the last count, in [0, 1].
        """
        nonzeros = grown = total = 0
        elsewhere: dict[ProcessGroup, Tensor] = {}
        for i, parameter in enumerate(self.parameters):
            mask, before = _mask(parameter), self._masks[i]
            if isinstance(parameter, SparseWeight):
                nonzeros += len(mask)
                grown += len(mask) - len(np.intersect1d(mask, before, assume_unique=True))
                total += parameter.shape[0] * parameter.shape[1]
            else:
                counts = _count(mask), _count(mask & ~before)
                if (group := shard_group(parameter)) is not None:
                    here = torch.tensor(counts, device=parameter.device)
                    elsewhere[group] = elsewhere.get(group, 0) + here
                    counts = 0, 0
                nonzeros += counts[0]
                grown += counts[1]
                total += parameter.numel()
            self._masks[i] = mask
        for group, counts in elsewhere.items():
            dist.all_reduce(counts, group=group)
            nonzeros += int(counts[0])
            grown += int(counts[1])
        return {
            "nonzeros": nonzeros,
            "nonzero_fraction": nonzeros / max(1, total),
            "mask_churn": grown / max(1, nonzeros),
        }


def _mask(parameter: Tensor | SparseWeight) -> np.ndarray:
    """One bit per entry, packed; of a layer that holds nonzeros, their flat positions."""
    if isinstance(parameter, SparseWeight):
        flat = parameter.csr.positions
        return flat[parameter.values.detach() != 0].cpu().numpy()
    return np.packbits((local(parameter.detach()) != 0).cpu().numpy())


def _count(mask: np.ndarray) -> int:
    return int.from_bytes(mask.tobytes(), "little").bit_count()
