"""Searching the settings of mask learning for the smallest circuit.

The paper tunes its pruning for every model and task, and so only the smallest circuit found counts
(A.5). Here the search is optuna's TPE. Its state is a journal of JSON lines in a folder, so it goes
on where it was stopped, and goes the same way as if it had not been.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from ...files import SAVING, check_can_write, replacing, write_json
from ...modeling.fingerprint import model_fingerprint
from ...tasks.binary_task import BinaryTask
from ..ablation import ReferenceTokens, means_over, node_sites, unwrapped
from ..circuit import Circuit
from ..circuit_file import JSON_NAME
from .config import PruningConfig
from .find import circuit_size, find_circuits, smallest

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

JOURNAL_NAME = "trials.jsonl"
LOCK_NAME = ".lock"
SETTINGS_NAME = "search.json"
BEST_NAME = "smallest"
# Settings and their ranges, by how optuna samples them; the defaults are well inside.
_LOGARITHMIC = {
    "node_penalty": (1e-5, 3e-3),
    "learning_rate": (1e-3, 3e-2),
    "temperature": (0.2, 3.0),
    "weight_decay": (1e-5, 1e-1),
    "max_grad_norm": (0.1, 10.0),
}
_LINEAR = {"init_mean": (0.02, 0.5), "adam_beta2": (0.85, 0.995)}
SEARCHED = (*_LOGARITHMIC, *_LINEAR)


def search_circuit(
    model: nn.Module,
    task: BinaryTask,
    config: PruningConfig | None = None,
    *,
    trials: int = 16,
    folder: str | os.PathLike,
    reference: ReferenceTokens = None,
    progress: bool = True,
) -> Circuit:
    """The smallest circuit over many settings of [`find_circuit`].

    The first trial has the settings passed, so the result is never larger than theirs.

    Args:
        model: as for [`find_circuit`].
        task: as for [`find_circuit`].
        config: what the search does not vary (target loss, steps, seeds, what may be pruned), and
            where it starts for `SEARCHED`. Its seed is also that of the search.
        trials: how many settings to try in all, those of an earlier call on this folder included.
        folder: holds the state of the search. The same call goes on where it was stopped.
        reference: as for [`find_circuit`].
        progress: show progress bars.

    Returns:
        The circuit with the fewest edges, then nodes.

    Raises:
        ValueError: optuna is not installed, the folder holds a search with other settings, or
            another process is searching in it.
        TaskNotLearnedError: see [`find_circuit`].
    """
    optuna = _optuna()
    config = config or PruningConfig()
    if trials < 1:
        raise ValueError(f"trials={trials} was passed, but it must be ≥ 1.")
    node_sites(model)
    model = unwrapped(model)
    folder = Path(folder)
    check_can_write(folder)
    means = means_over(model, task, reference, config.reference_tokens, progress)
    rows = {} if task.text is None else {"task_digest": task.text.digest()}
    _check_settings(
        folder, {"model": model_fingerprint(model), "task": task.name, **rows, **asdict(config)}
    )

    best = folder / BEST_NAME
    shutil.rmtree(best / SAVING, ignore_errors=True)  # of a process that was killed

    def objective(trial: Any) -> float:
        settings = {n: trial.suggest_float(n, *r, log=True) for n, r in _LOGARITHMIC.items()}
        settings |= {n: trial.suggest_float(n, *r) for n, r in _LINEAR.items()}
        circuit = smallest(
            find_circuits(
                model, task, replace(config, **settings), reference=means, progress=progress
            )
        )
        # Saved before the trial counts as done, so that no recorded trial is without its circuit.
        # After a save that was cut off there is none: its trial comes again, with its circuit.
        saved = (best / JSON_NAME).is_file()
        if not saved or circuit_size(circuit) < circuit_size(Circuit.from_pretrained(best)):
            circuit.save_pretrained(best)
        # One number for optuna: edges, and nodes where edges are equal.
        return circuit.metrics["edges"] + circuit.metrics["nodes"] / 1e4

    journal = folder / JOURNAL_NAME
    with _only_one(folder):
        _drop_torn_line(journal)
        storage = optuna.storages.JournalStorage(
            optuna.storages.journal.JournalFileBackend(str(journal), lock_obj=_NoLock())
        )
        study = optuna.create_study(storage=storage, study_name="search", load_if_exists=True)
        states = optuna.trial.TrialState
        done = len(study.get_trials(deepcopy=False, states=[states.COMPLETE]))
        queued = study.get_trials(deepcopy=False, states=[states.WAITING])
        with tqdm(
            total=trials, initial=min(done, trials), desc="trials", disable=not progress,
            leave=False,
        ) as bar:  # fmt: skip
            for number in range(done, trials):
                # A sampler of its own for every trial: a search that was stopped and goes on must
                # not draw its first numbers again.
                study.sampler = optuna.samplers.TPESampler(
                    seed=config.seed * 1_000_003 + number, n_startup_trials=5
                )
                if number == 0 and not queued:  # or else the second trial would be the first again
                    study.enqueue_trial({name: getattr(config, name) for name in SEARCHED})
                study.optimize(objective, n_trials=1)
                bar.update()
                bar.set_postfix_str(f"fewest edges {int(study.best_value)}")
    return Circuit.from_pretrained(best)


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Within it, this process alone searches in the folder; a process that dies lets go of it.

    Raises:
        ValueError: another one does.
    """
    if fcntl is None:
        yield
        return
    with (folder / LOCK_NAME).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"another process is searching in {folder}: wait for it, or choose another folder."
            ) from error
        except OSError:  # a file system without locks
            pass
        yield


class _NoLock:
    """For optuna's journal, whose own lock outlives a process that is killed."""

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        pass


def _drop_torn_line(journal: Path) -> None:
    """Cut off what a process that was killed had not finished writing."""
    if not journal.is_file():
        return
    content = journal.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        with replacing(journal) as temporary:
            temporary.write_bytes(whole)


def _check_settings(folder: Path, settings: dict[str, Any]) -> None:
    path = folder / SETTINGS_NAME
    if not path.is_file():
        return write_json(path, settings)
    stored = json.loads(path.read_text(encoding="utf-8"))
    for name, value in settings.items():
        if stored.get(name) != value:
            raise ValueError(
                f"{folder} holds a search with {name}={stored.get(name)!r}, but {value!r} was "
                "asked for; pass the same, choose another folder, or delete this one."
            )


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise ValueError(
            "Searching for settings needs optuna, which is not installed: "
            "pip install 'hf-circuit-sparsity[search]'."
        ) from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna
