"""What the commands print."""

import logging
import os
import sys
import warnings
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from typing import Any


class Interrupted(Exception):
    """A command was stopped by Ctrl-C.

    Args:
        message: what is kept, and how to go on.
        checkpoint: whether it is the checkpoint of a training.
    """

    def __init__(self, message: str, checkpoint: bool = False) -> None:
        super().__init__(message)
        self.checkpoint = checkpoint


def say(text: str = "") -> None:
    """Print a line at once, also where the output is a file; the first of several processes."""
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)


def quiet_libraries() -> None:
    """Leave the console to the command: no bars and notices of the libraries underneath."""
    from datasets.utils.logging import disable_progress_bar
    from transformers.utils import logging as transformers_logging

    disable_progress_bar()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(transformers|torch|accelerate)\.")


def on_terminal() -> bool:
    """Whether somebody sees a progress bar; into a file it would write a line per step."""
    return sys.stderr.isatty()


def check_can_draw() -> None:
    """Before the work of a command that draws its outcome: is there what draws?

    Raises:
        ValueError: matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise ValueError(
            "This command draws circuits with matplotlib, which is not installed; "
            "pip install 'hf-circuit-sparsity[viz]'."
        )


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
