"""A small task of one's own, for the tokenizer of the planted model."""

import csv
from pathlib import Path

from hf_circuit_sparsity.tasks.text import COLUMNS

PAIRS = [
    (f"w{i} w{j} on", f"w{i} w{j} off", t)
    for i, t in ((0, "a"), (1, "b"), (2, "c"))
    for j in range(3, 7)
]


def rows(**more: str) -> list[dict[str, str]]:
    """Twelve rows of three templates, answered by yes and no."""
    return [
        {"prompt": on, "target": " yes", "counterfactual_prompt": off,
         "counterfactual_target": " no", "template": template, **more}
        for on, off, template in PAIRS
    ]  # fmt: skip


def write_csv(path: Path, table: list[dict[str, str]] | None = None) -> Path:
    table = rows() if table is None else table
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, table[0] if table else COLUMNS)
        writer.writeheader()
        writer.writerows(table)
    return path
