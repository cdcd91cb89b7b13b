"""What the commands print."""

import logging
import sys
import time
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from datasets.utils.logging import disable_progress_bar as quiet_datasets
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback
from transformers.utils import logging as transformers_logging


def say(text: str = "") -> None:
    """Print a line at once, also where the output is a file."""
    print(text, flush=True)


def quiet_libraries() -> None:
    """Leave the console to the command: no bars and notices of the libraries underneath."""
    quiet_datasets()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(transformers|torch|accelerate)\.")


def table(rows: Iterable[tuple[str, Any]]) -> str:
    """Two aligned columns."""
    rows = [(name, str(value)) for name, value in rows]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)


def columns(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table with a header: the first column to the left, the others to the right."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  "
        + f"{line[0]:<{widths[0]}}"
        + "".join(f"  {cell:>{width}}" for cell, width in zip(line[1:], widths[1:], strict=True))
        for line in lines
    )


class TrainingDisplay(TrainerCallback):
    """A progress bar, and a line about loss and density every time the Trainer logs.

    Args:
        measure: called at every log; what it returns is added to the line.
    """

    COLUMNS = ("step", "loss", "density", "nonzeros", "churn", "tokens/s")

    def __init__(self, tokens_per_step: int, measure: Any = None):
        self.tokens_per_step = tokens_per_step
        self.measure = measure
        self._bar: tqdm | None = None
        self._since = (0, 0.0)
        self._header = False

    @classmethod
    def attach(cls, trainer: Trainer, tokens_per_step: int, measure: Any = None) -> None:
        """Put this display in the place of the Trainer's own."""
        for other in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(other)
        trainer.add_callback(cls(tokens_per_step, measure))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc="training",
            unit="step",
            dynamic_ncols=True,
            file=sys.stderr,
            # Where the output is a file, a bar that redraws itself is a line a second.
            mininterval=0.5 if sys.stderr.isatty() else 60,
        )
        self._since = (state.global_step, time.perf_counter())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar.update(state.global_step - self._bar.n)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any
    ) -> None:
        if not logs or "loss" not in logs:
            return
        steps, then = self._since
        now = time.perf_counter()
        speed = (state.global_step - steps) * self.tokens_per_step / max(now - then, 1e-9)
        cells = {
            "step": f"{state.global_step}/{state.max_steps}",
            "loss": f"{float(logs['loss']):.3f}",
            "density": f"{logs.get('nonzero_fraction', 1.0):.4f}",
            "nonzeros": f"{int(logs.get('nonzeros', 0)):,}",
            "churn": f"{logs.get('mask_churn', 0.0):.3f}",
            "tokens/s": f"{speed:,.0f}",
        }
        if self.measure is not None:
            cells |= self.measure()
        if not self._header:
            self._bar.write("  ".join(f"{name:>10}" for name in cells))
            self._header = True
        self._bar.write("  ".join(f"{value:>10}" for value in cells.values()))
        self._since = (state.global_step, time.perf_counter())

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar.close()
