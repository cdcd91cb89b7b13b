"""What drawing single coordinates by magnitude (MB-RCD) costs or saves on the lasso.

The steps of `RCDSparseOptimizer` with blocks of one entry, in numpy, which is far faster for so
small problems: so there can be several, and seeds.
"""

import numpy as np

from ..experiment import Experiment, table

PROBLEMS = ((60, 40, 8, 0.05), (400, 200, 20, 0.01), (200, 200, 20, 0.02))
FLOORS = (1.0, 0.5, 0.25, 0.1, 0.05)
MOST_PASSES = 100


def passes_to_the_optimum(
    rows: int, columns: int, behind: int, penalty: float, floor: float, seed: int
) -> float:
    """Steps per coordinate until the objective is within 1e-4 of its optimum; inf if it is not."""
    random = np.random.default_rng(seed)
    features = random.normal(size=(rows, columns)) / rows**0.5
    truth = np.zeros(columns)
    truth[:behind] = random.normal(size=behind)
    targets = features @ truth + 0.1 * random.normal(size=rows) / rows**0.5
    quadratic, linear = features.T @ features, features.T @ targets

    def objective(x: np.ndarray) -> float:
        return 0.5 * x @ quadratic @ x - linear @ x + penalty * np.abs(x).sum()

    def moved(x: float, slope: float, step: float) -> float:
        x -= step * slope
        return np.sign(x) * max(0.0, abs(x) - step * penalty)

    best = np.zeros(columns)
    for _ in range(400):
        for i in range(columns):
            slope = quadratic[i] @ best - linear[i]
            best[i] = moved(best[i], slope, 1 / quadratic[i, i])
    optimum = objective(best)
    x, gradient, step = np.zeros(columns), -linear, 1 / quadratic.diagonal().max()
    for taken in range(1, MOST_PASSES * columns):
        size = np.abs(x).cumsum()
        if size[-1] == 0.0 or random.random() < floor:
            i = int(random.integers(columns))
        else:
            i = min(columns - 1, int(np.searchsorted(size, random.random() * size[-1])))
        new = moved(x[i], gradient[i], step)
        gradient = gradient + quadratic[:, i] * (new - x[i])
        x[i] = new
        if taken % (columns // 4) == 0 and objective(x) - optimum < 1e-4 * abs(optimum):
            return taken / columns
    return np.inf


def run(experiment: Experiment) -> str:
    """The table: median and worst of the seeds."""
    rows = []
    for problem in PROBLEMS:
        found = {
            floor: [
                passes_to_the_optimum(*problem, floor, seed)
                for seed in range(experiment.options.seeds)
            ]
            for floor in FLOORS
        }
        rows.append(
            {"rows × coordinates, penalty": f"{problem[0]} × {problem[1]}, {problem[3]}"}
            | {
                "uniform" if floor == 1.0 else f"floor {floor}": (
                    f"{np.median(steps):.0f} ({max(steps):.0f})"
                )
                for floor, steps in found.items()
            }
        )
    return (
        "# Coordinates drawn by magnitude, on the lasso\n\nSteps per coordinate until the "
        "objective is within 1e-4 of its optimum, relatively: single coordinates, random "
        f"features, median and (worst) of {experiment.options.seeds} seeds; inf: not within "
        f"{MOST_PASSES}.\n\n" + table(rows)
    )


if __name__ == "__main__":
    Experiment.main(run, __doc__, "rcd_convex", "runs/rcd", seeds=10)
