"""Callbacks for any ``transformers.Trainer``."""

import signal
import sys
import threading
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class InterruptCallback(TrainerCallback):
    """Makes Ctrl-C stop the training after the current step, with a checkpoint to resume from.

    The first Ctrl-C asks for that; a second one raises ``KeyboardInterrupt`` at once. While
    training runs in the main thread the callback handles SIGINT; it hands it back at the end. If
    training ends by an exception it cannot know: call :meth:`restore` then.

    Attributes:
        interrupted: whether Ctrl-C was pressed during the last training.
    """

    def __init__(self) -> None:
        self.interrupted = False
        self._installed = False
        self._previous: Any = None
        self._saved = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.interrupted = self._saved = False
        # Python takes signal handlers from the main thread only; elsewhere Ctrl-C stays as it is.
        if not self._installed and threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._on_signal)
            self._installed = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # An evaluation that is due at this very step still takes place: it draws random numbers, so
        # without it the resumed run would not be the one that never stopped.
        self._stop(control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._stop(control)
        if self.interrupted:
            control.should_evaluate = False  # the epoch did not end, it was cut short

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._saved = self.interrupted

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.restore()

    def restore(self) -> None:
        """Hand SIGINT back to whoever had it before the training. Does no harm twice."""
        if self._installed:
            # None stands for a handler not set from Python, which Python cannot set again.
            previous = signal.SIG_DFL if self._previous is None else self._previous
            signal.signal(signal.SIGINT, previous)
            self._installed = False

    def _stop(self, control: TrainerControl) -> None:
        if self.interrupted:
            control.should_training_stop = True
            control.should_save = not self._saved

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.interrupted:
            self.restore()
            raise KeyboardInterrupt
        self.interrupted = True
        print(
            "\nStopping after this step and saving a checkpoint; Ctrl-C again to stop at once.",
            file=sys.stderr,
            flush=True,
        )
