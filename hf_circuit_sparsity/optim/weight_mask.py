"""Which weights of a model are nonzero."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..files import save_figure
from ..modeling.csr import CSR
from ..modeling.sparse_layers import SparseWeight
from .keep_largest import positions_of
from .param_groups import trained_weight


class WeightMask(Mapping[str, Tensor]):
    """Which weights of a model are nonzero: parameter name → bool mask of the parameter's shape.

    Only the positions are kept; a mask is built when it is asked for.

    Args:
        patterns: name → nonzeros of the matrix.

    Attributes:
        shapes: name → shape of the matrix.
    """

    def __init__(self, patterns: dict[str, CSR]) -> None:
        self._patterns = patterns
        self.shapes = {name: torch.Size(csr.shape) for name, csr in patterns.items()}

    def __getitem__(self, name: str) -> Tensor:
        mask = torch.zeros(self.shapes[name].numel(), dtype=torch.bool)
        mask[self._patterns[name].positions] = True
        return mask.view(self.shapes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._patterns)

    def __len__(self) -> int:
        return len(self._patterns)

    def indices(self, name: str) -> Tensor:
        """Where the nonzeros of a parameter are: `(2, nonzeros)` int64."""
        pattern = self._patterns[name]
        return torch.stack([pattern.row_of, pattern.columns.long()])

    def nonzeros(self, name: str | None = None) -> int:
        """Number of nonzeros of a parameter, or of all."""
        if name is not None:
            return len(self._patterns[name])
        return sum(len(pattern) for pattern in self._patterns.values())

    def density(self, name: str | None = None) -> float:
        """Share of nonzeros in a parameter, or in all, in [0, 1]."""
        sizes = self.shapes.values() if name is None else [self.shapes[name]]
        return self.nonzeros(name) / max(1, sum(shape.numel() for shape in sizes))

    def summary(self) -> list[dict[str, str | int | float]]:
        """For each parameter: `name`, `nonzeros`, `entries` and `density`."""
        return [
            {
                "name": name,
                "nonzeros": self.nonzeros(name),
                "entries": self.shapes[name].numel(),
                "density": self.density(name),
            }
            for name in self
        ]

    def overlap(self, other: "WeightMask") -> float:
        """Share of these nonzeros that are nonzero in `other` too, in [0, 1].

        Raises:
            ValueError: if the masks are not of the same architecture.
        """
        if self.shapes != other.shapes:
            raise ValueError(
                "other has other parameters or shapes: compare masks of one architecture."
            )
        common = sum(
            int(torch.isin(self._patterns[n].positions, other._patterns[n].positions).sum())
            for n in self
        )
        return common / max(1, self.nonzeros())

    def plot(self, path: str | os.PathLike[str]) -> Path:
        """Draw the density of every parameter, in the order of the model, into a picture file.

        Returns:
            `path`.

        Raises:
            ImportError: if matplotlib is not installed.
        """
        return save_figure(path, self._figure, dpi=150)

    def _figure(self, figure_class: type) -> Any:
        rows = self.summary()
        heights = range(len(rows))
        figure = figure_class(figsize=(8, 1.2 + 0.24 * len(rows)), layout="constrained")
        axes = figure.add_subplot()
        # Dots, as a bar has no length on a logarithmic scale. What is empty is drawn at the edge.
        least = min((row["density"] for row in rows if row["density"]), default=1.0) / 3
        shares = [max(row["density"], least) for row in rows]
        axes.plot(shares, heights, "o", color="#2e6da4", markersize=4)
        axes.hlines(heights, least, shares, color="#2e6da4", linewidth=0.8)
        axes.set_xscale("log")
        axes.set_xlim(least, 2.0)
        axes.set_yticks(heights, [row["name"] for row in rows], fontsize=7)
        axes.invert_yaxis()
        for share, height, row in zip(shares, heights, rows, strict=True):
            axes.annotate(
                f"{row['nonzeros']:,}", (share, height), (5, 0), textcoords="offset points",
                fontsize=6, va="center",
            )  # fmt: skip
        axes.set_xlabel("share of nonzeros, and their number")
        axes.set_title(
            f"{self.nonzeros():,} nonzero weights, density {self.density():.4g}", fontsize=9
        )
        axes.spines[["top", "right"]].set_visible(False)
        return figure

    def __str__(self) -> str:
        width = max((len(name) for name in self), default=4)
        lines = [
            f"{row['name']:<{width}}  {row['nonzeros']:>12,}  {row['density']:.4%}"
            for row in self.summary()
        ]
        return "\n".join(
            [*lines, f"{'all':<{width}}  {self.nonzeros():>12,}  {self.density():.4%}"]
        )

    def __repr__(self) -> str:
        return f"WeightMask({len(self)} parameters, {self.nonzeros():,} nonzeros)"


@torch.no_grad()
def extract_mask(model: nn.Module) -> WeightMask:
    """The nonzeros of any model: the weights of its linear layers and embeddings.

    Takes `nn.Linear`, transformers' `Conv1D` and `nn.Embedding` and the layers that run on
    their nonzeros ([`to_sparse`]). Shared weights appear once, under their first name. The
    result is on the CPU.

    Raises:
        ValueError: if the model has no such layer, or its weights are not in memory.
    """
    patterns: dict[str, CSR] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | Conv1D | nn.Embedding | SparseWeight):
            continue
        sparse = isinstance(module, SparseWeight)
        held = trained_weight(module)
        if id(held) in seen:
            continue
        seen.add(id(held))
        key = f"{name}.weight" if name else "weight"
        if held.device.type == "meta":
            raise ValueError(
                f"{key} is offloaded (on the meta device): reload the model without offloading."
            )
        positions = positions_of(held.detach().reshape(-1) != 0)
        positions = module.csr.positions[positions] if sparse else positions
        shape = module.shape if sparse else held.shape
        patterns[key] = CSR.from_positions(positions.cpu(), shape)
    if not patterns:
        raise ValueError(
            f"{type(model).__name__} has no nn.Linear, Conv1D or nn.Embedding: there is no mask "
            "to extract."
        )
    return WeightMask(patterns)
