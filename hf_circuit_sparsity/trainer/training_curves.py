"""A picture of a training run: its loss, and above it the density."""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from ..files import save_figure
from .checkpoints import checkpoints_of

STATE_NAME = "trainer_state.json"
LOSS, EVALUATION, DENSITY = "#0067a5", "#1b1b1b", "#c65300"


class TrainingCurves(NamedTuple):
    """What a `Trainer` logged, as pairs of a step and a value.

    Attributes:
        loss: of training, nats per token, mean over the steps since the last log.
        evaluation: loss on the evaluation set, nats per token.
        density: share of the sparse weights that are not zero.
    """

    loss: list[tuple[int, float]]
    evaluation: list[tuple[int, float]]
    density: list[tuple[int, float]]


def read_training_curves(run_dir: str | os.PathLike) -> TrainingCurves:
    """Read the logs of a training run.

    Args:
        run_dir: the run's output folder; its own `trainer_state.json` or its last checkpoint's.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or nothing was logged.
    """
    folder = Path(run_dir)
    path = folder / STATE_NAME
    if not path.is_file():
        states = [checkpoint / STATE_NAME for checkpoint in checkpoints_of(folder)]
        path = next((state for state in reversed(states) if state.is_file()), path)
        if not path.is_file():
            raise FileNotFoundError(
                f"{folder} has no {STATE_NAME}, nor a checkpoint with one; pass the output folder "
                "of a training run."
            )
    try:
        logs = json.loads(path.read_text(encoding="utf-8"))["log_history"]
        curves = TrainingCurves(
            *(
                [(int(log["step"]), float(log[name])) for log in logs if name in log]
                for name in ("loss", "eval_loss", "nonzero_fraction")
            )
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} does not hold a Trainer's logs: {error!r}.") from error
    if not curves.loss:
        raise ValueError(f"{path} has no logged loss to draw; train with a smaller logging_steps.")
    return curves


def plot_training_curves(
    run_dir: str | os.PathLike, path: str | os.PathLike, width: float = 3.25
) -> Path:
    """Draw a run's loss, with its density above it, into a PNG, SVG or PDF (needs matplotlib).

    Args:
        run_dir: the run's output folder.
        path: of the picture; its suffix says the format.
        width: inches; 3.25 fits one column of a two-column page, 6.75 both.

    Raises:
        FileNotFoundError, ValueError: as [`read_training_curves`].
        ImportError: matplotlib is not installed.
    """
    curves = read_training_curves(run_dir)
    return save_figure(path, lambda figure_class: _draw(figure_class, curves, width), font__size=7)


def _draw(figure_class: Any, curves: TrainingCurves, width: float) -> Any:
    has_density = bool(curves.density)
    figure = figure_class(figsize=(width, 2.5), layout="constrained")
    if has_density:
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(1, 2.4))
        upper.plot(*zip(*curves.density, strict=True), color=DENSITY, linewidth=1.2)
        upper.set_yscale("log")
        upper.set_ylabel("density")
        step, last = curves.density[-1]
        upper.annotate(
            f"{last:.3g}", (step, last), xytext=(0, 3), textcoords="offset points", ha="right",
            va="bottom", color=DENSITY,
        )  # fmt: skip
    else:
        upper, lower = None, figure.subplots()
    lower.plot(*zip(*curves.loss, strict=True), color=LOSS, linewidth=1.2, label="training")
    if curves.evaluation:
        lower.plot(
            *zip(*curves.evaluation, strict=True), color=EVALUATION, linewidth=0.8, marker="o",
            markersize=3, label="validation",
        )  # fmt: skip
        lower.legend(frameon=False)
    lower.set_ylabel("loss (nats per token)")
    lower.set_xlabel("step")
    lower.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    for axes in filter(None, (upper, lower)):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e4e4e4", linewidth=0.5)
        axes.set_axisbelow(True)
    return figure
