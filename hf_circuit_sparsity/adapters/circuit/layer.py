"""A linear layer, a few of whose weights are trained."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn
from transformers.pytorch_utils import Conv1D


class CircuitLayer(nn.Module, BaseTunerLayer):
    """A linear layer with trainable numbers added to a few of its weights.

    Args:
        base_layer: an `nn.Linear` or `Conv1D`.
    """

    adapter_layer_names = ("circuit_values",)

    def __init__(self, base_layer: nn.Module):
        nn.Module.__init__(self)
        self.base_layer = base_layer
        self.circuit_values = nn.ParameterDict()
        # `(2, n)`: rows and columns of the values, by adapter. The config saves them, not the
        # weights.
        self.positions: dict[str, torch.Tensor] = {}
        self._disable_adapters = False
        self._active_adapter: str | list[str] = []
        self.merged_adapters: list[str] = []

    def add(self, adapter_name: str, positions: Iterable[Sequence[int]], inference: bool) -> None:
        """Add an adapter, whose values are zero at first.

        Args:
            adapter_name: its name.
            positions: `[row, column]` of each value.
            inference: whether its values stay frozen.
        """
        weight = self.get_base_layer().weight
        self.positions[adapter_name] = torch.tensor(list(positions), dtype=torch.long).T
        values = weight.new_zeros(self.positions[adapter_name].shape[1])  # PEFT casts them
        self.circuit_values[adapter_name] = nn.Parameter(values, requires_grad=not inference)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        y = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return y
        for name in self.active_adapters:
            if name in self.circuit_values:
                rows, columns = self.positions[name].to(x.device)
                values = self.circuit_values[name].to(x.dtype)
                y = y.index_add(-1, rows, x.index_select(-1, columns) * values)
        return y

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the values to the layer's own weights.

        Raises:
            ValueError: with `safe_merge`, if a value is not finite.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.circuit_values:
                continue
            values = self.circuit_values[name]
            if safe_merge and not torch.isfinite(values).all():
                # In PEFT's own words, which its suite looks for.
                what = "NaNs" if values.isnan().any() else "Infinities"
                raise ValueError(
                    f"{what} detected in the merged weights. The adapter {name} seems to be broken"
                )
            self._add_to_weight(name, values)
            self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Undo [`merge`]."""
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            self._add_to_weight(name, -self.circuit_values[name])

    def _add_to_weight(self, adapter_name: str, values: torch.Tensor) -> None:
        base = self.get_base_layer()
        rows, columns = self.positions[adapter_name].to(base.weight.device)
        index = (columns, rows) if isinstance(base, Conv1D) else (rows, columns)
        base.weight.index_put_(index, values.to(base.weight.dtype), accumulate=True)
