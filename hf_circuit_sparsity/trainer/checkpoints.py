"""Checkpoints that are whole, and of the run that goes on from them.

A checkpoint is written in the folder [`UNFINISHED`] beside the others and moved into place when all
of it is there, with [`RUN_NAME`], which says what run it is of. A file of that name beside the
checkpoints says which run is the folder's: the one that began there last.
"""

import errno
import hashlib
import json
import logging
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedTokenizerBase, Trainer, TrainerState
from transformers.trainer import (
    FSDP_MODEL_NAME,
    OPTIMIZER_NAME,
    SCHEDULER_NAME,
    TRAINER_STATE_NAME,
    TRAINING_ARGS_NAME,
    align_special_tokens,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, sort_checkpoints

from ..files import write_json

logger = logging.getLogger(__name__)

UNFINISHED = ".unfinished"
_SMALL = 1 << 20  # bytes of a disk that is full
RUN_NAME = "run.json"
# Of a config: what changes without the model being another one, in part by training itself.
_NOT_THE_MODEL = (
    "transformers_version", "_name_or_path", "architectures", "auto_map", "dtype", "use_cache",
    "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip


def last_whole_checkpoint(
    folder: str | os.PathLike, say: Callable[[str], None] = logger.warning
) -> str | None:
    """The newest checkpoint of a run's folder that is whole; None if there is none.

    Args:
        folder: `output_dir` of the run; need not exist.
        say: called with a sentence for each newer one that is passed over.
    """
    own = _read_run(folder).get("id")
    for path in reversed(checkpoints_of(folder)):
        problem = problem_of(path)
        if problem is None and own is not None and _read_run(path).get("id", own) != own:
            problem = "it is of an earlier run in this folder"
        if problem is None:
            return str(path)
        say(f"{path} is passed over: {problem}.")
    return None


def problem_of(checkpoint: str | os.PathLike) -> str | None:
    """Why one cannot go on from a checkpoint, as a clause; None if one can.

    Files are opened, not read: what was cut off, or never written, is found.
    """
    folder = Path(checkpoint)
    try:
        json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))["global_step"]
    except FileNotFoundError:
        return f"it has no {TRAINER_STATE_NAME}, so it was not finished"
    except (OSError, ValueError, KeyError, TypeError):
        return f"its {TRAINER_STATE_NAME} is damaged"
    safe = list(folder.rglob("*.safetensors"))
    pickled = [p for p in folder.rglob("*.bin") if p.name != TRAINING_ARGS_NAME]
    sharded = list(folder.glob(f"{FSDP_MODEL_NAME}_*"))
    if not safe and not pickled and not sharded:
        return "it has no weights"
    for path in (*sharded, *folder.glob(f"{Path(OPTIMIZER_NAME).stem}_*")):
        if not (path / ".metadata").is_file():  # written when all ranks have written theirs
            return f"its {path.name} is not complete"
    for path in safe:
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError, ValueError):
            return f"its {path.name} is damaged"
    for path in (*pickled, folder / OPTIMIZER_NAME, folder / SCHEDULER_NAME):
        # What torch saves is an archive whose table of contents comes last.
        if path.is_file() and not zipfile.is_zipfile(path):
            return f"its {path.name} is damaged"
    return None


def check_whole(checkpoint: str | os.PathLike) -> None:
    """Raise ValueError if one cannot go on from a checkpoint."""
    problem = problem_of(checkpoint) if Path(checkpoint).is_dir() else "there is no such folder"
    if problem is not None:
        raise ValueError(
            f"{checkpoint} was passed to resume from, but {problem}: pass another checkpoint, or "
            "start without resuming."
        )


@contextmanager
def reading(checkpoint: str | os.PathLike | None) -> Iterator[None]:
    """Within it files of a checkpoint are read by torch, which says in many ways that it cannot.

    Raises:
        ValueError: one is damaged.
    """
    try:
        yield
    except (RuntimeError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"a file of {checkpoint} is damaged ({reason}): resume from an earlier checkpoint, or "
            "start without resuming."
        ) from error


def checkpoints_of(folder: str | os.PathLike) -> list[Path]:
    """Folders named as checkpoints of a run, whole or not, by their steps."""
    folder, found = Path(folder), []
    for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if folder.is_dir() else ():
        step = path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        if step.isdecimal() and path.is_dir():
            found.append((int(step), path))
    return [path for _, path in sorted(found)]


def _read_run(folder: str | os.PathLike) -> dict[str, Any]:
    """What the folder of a run, or a checkpoint, says of its run; nothing if it says nothing."""
    try:
        content = json.loads((Path(folder) / RUN_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


class WholeCheckpoints(Trainer):
    """`Trainer` whose checkpoints are whole or not there, and know their run.

    `resume_from_checkpoint=True` goes on from the newest whole one, and refuses one of another run
    (another model, other data, another seed, more steps); a checkpoint that is named is taken, and
    what differs is said. A run whose last step was saved trains no more.
    """

    _unfinished: Path | None = None
    _run_id = ""

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer`'s; see the class.

        Raises:
            ValueError: there is no whole checkpoint, or the one asked for is damaged or, unless it
                was named, of another run; nothing has been changed then.
        """
        folder = Path(self.args.output_dir)
        if self.args.should_save:
            # Of a run that was killed; the latter is what safetensors writes to.
            shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
            for path in filter(Path.is_file, folder.glob(".tmp??????")):
                path.unlink()
        found = checkpoints_of(folder)
        if resume_from_checkpoint in (None, False):
            if found and self.args.should_save:
                logger.warning(
                    "%s has %s of an earlier run; this one starts anew.",
                    folder, ", ".join(path.name for path in found[-3:]),
                )  # fmt: skip
            self._begin(os.urandom(8).hex())
            return super().train(resume_from_checkpoint, *args, **kwargs)
        named = resume_from_checkpoint is not True
        checkpoint = resume_from_checkpoint if named else last_whole_checkpoint(folder)
        if checkpoint is None:
            raise ValueError(f"there is no whole checkpoint in {folder}: start without resuming.")
        self.check_run(checkpoint, named)
        self._begin(_read_run(checkpoint).get("id") or os.urandom(8).hex())
        state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
        if self._is_done(state):  # Trainer would take one more step
            logger.warning(
                "%s has all %d steps: nothing is left to train.", checkpoint, state.global_step
            )
            self._load_from_checkpoint(str(checkpoint))
            tokenizer = isinstance(self.processing_class, PreTrainedTokenizerBase)
            if tokenizer and hasattr(self.model, "config"):  # as `Trainer` does before it trains
                align_special_tokens(self.model, self.processing_class)
            self.state = state
            if self.args.should_save and not named:  # it may have been killed before it did that
                self._let_go_of_the_oldest(folder, checkpoint)
            if self.args.load_best_model_at_end and state.best_model_checkpoint is not None:
                self._load_best_model()
            return TrainOutput(state.global_step, 0.0, {})
        return super().train(str(checkpoint), *args, **kwargs)

    def _is_done(self, state: TrainerState) -> bool:
        """Whether a run with this state has come to its end, as the arguments have it now."""
        if self.args.max_steps > 0:
            return state.global_step >= self.args.max_steps
        return (state.epoch or 0.0) >= self.args.num_train_epochs

    def check_run(self, checkpoint: str | os.PathLike, named: bool) -> None:
        """Whether this run may go on from a checkpoint.

        Args:
            checkpoint: its folder.
            named: whether the user named it: then what differs from its run is only said.

        Raises:
            ValueError: it is damaged or, unless named, of another run.
        """
        check_whole(checkpoint)
        state = json.loads((Path(checkpoint) / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        differences = []
        if 0 < self.args.max_steps < state["global_step"]:
            differences.append(f"its step is {state['global_step']} of {self.args.max_steps}")
        saved, own = _read_run(checkpoint), self._run()
        processes = saved.pop("processes", own["processes"])
        if processes != own.pop("processes"):
            logger.warning(
                "%s was saved by %s processes and goes on with %s: batches are dealt otherwise, so "
                "it is not the same run any more.",
                checkpoint, processes, self.args.world_size,
            )  # fmt: skip
        differences += [
            f"its {name} is {saved[name]}, this run's is {own[name]}"
            for name in own
            if saved.get(name) is not None and own[name] is not None and saved[name] != own[name]
        ]
        if not differences:
            return
        if not named:
            raise ValueError(
                f"{checkpoint} is of another run: {'; '.join(differences)}. Name it to go on from "
                "it all the same, start without resuming, or choose another output_dir."
            )
        logger.warning("%s is of another run: %s.", checkpoint, "; ".join(differences))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with reading(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with reading(checkpoint):
            super()._load_rng_state(checkpoint)

    def _begin(self, run_id: str) -> None:
        """From now on the folder's checkpoints are those of this run."""
        self._run_id = run_id
        if self.args.should_save and self.args.save_strategy != "no":
            write_json(Path(self.args.output_dir) / RUN_NAME, {"id": run_id})

    def _run(self) -> dict[str, Any]:
        """What makes this run this one: hashes of its model and its data, its seed, and with how
        many processes it runs. What cannot be told is None."""
        config = getattr(self.accelerator.unwrap_model(self.model), "config", None)
        fields = config.to_dict() if hasattr(config, "to_dict") else None
        if fields is not None:
            fields = {k: v for k, v in fields.items() if k not in _NOT_THE_MODEL}
            fields = _digest(json.dumps(fields, sort_keys=True, default=str).encode())
        return {
            "model": fields,
            "data": _data_digest(self.train_dataset),
            "seed": self.args.seed,
            "processes": self.args.world_size,
        }

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._unfinished is None else str(self._unfinished)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """As `Trainer`'s, which asks [`_get_output_dir`] where to write."""
        run_folder, push = Path(self._get_output_dir(trial)), self.args.push_to_hub
        folder = run_folder / UNFINISHED
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(folder, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._unfinished, self.args.push_to_hub = folder, False  # pushed from where it will be
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:  # as the writers raise them
            shutil.rmtree(folder, ignore_errors=True)
            free = shutil.disk_usage(run_folder).free
            if getattr(error, "errno", None) == errno.ENOSPC or free < _SMALL:
                raise OSError(
                    errno.ENOSPC,
                    f"there is no room for {run_folder / name} ({free >> 20} MB are free); what "
                    "was saved before is whole: make room and resume",
                ) from error
            raise
        finally:
            self._unfinished, self.args.push_to_hub = None, push
        self.accelerator.wait_for_everyone()
        if self.state.best_model_checkpoint == str(folder / name):
            self.state.best_model_checkpoint = str(run_folder / name)
        if self.args.should_save:
            self.state.save_to_json(str(folder / name / TRAINER_STATE_NAME))
            write_json(folder / name / RUN_NAME, {"id": self._run_id, **self._run()})
            if (run_folder / name).exists():
                os.replace(run_folder / name, folder / "replaced")
            os.replace(folder / name, run_folder / name)
            self._let_go_of_the_oldest(run_folder)
        self.accelerator.wait_for_everyone()
        if push:
            self._push_from_checkpoint(str(run_folder / name))

    def _let_go_of_the_oldest(self, folder: Path, in_use: str | None = None) -> None:
        """Remove what is beyond `save_total_limit`: a checkpoint goes as it comes, as a whole."""
        paths = [Path(p) for p in sort_checkpoints(str(folder), use_mtime=True)]
        kept = {*paths[-1:], *map(Path, filter(None, [self.state.best_model_checkpoint, in_use]))}
        limit, unfinished = self.args.save_total_limit or 0, folder / UNFINISHED
        beyond = len(paths) - max(limit, len(kept)) if limit > 0 else 0
        for path in [path for path in paths if path not in kept][: max(0, beyond)]:
            unfinished.mkdir(exist_ok=True)
            os.replace(path, unfinished / f"old-{path.name}")
        shutil.rmtree(unfinished, ignore_errors=True)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _data_digest(dataset: Any) -> str | None:
    """Of the number of rows and of three of them; None of a stream, or of rows of another kind."""
    try:
        n = len(dataset)
        rows = [dataset[i] for i in sorted({0, n // 2, n - 1})] if n else []
        content = [
            {key: np.asarray(value).tolist() for key, value in sorted(row.items())} for row in rows
        ]
        return _digest(json.dumps([n, content], sort_keys=True, default=str).encode())
    except (TypeError, AttributeError, KeyError, ValueError, NotImplementedError):
        return None
