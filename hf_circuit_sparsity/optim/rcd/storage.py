"""Where the weights lie that random coordinate descent trains: in whole matrices, or as nonzeros.

Positions are flat int64 indices into the matrix, ascending, as everywhere here.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...modeling.sparse_layers import SparseWeight
from .pattern import LivePattern


class MatrixStorage:
    """A parameter as torch holds it, zeros and all.

    Attributes:
        parameter: contiguous, of any shape.
        shape: as a matrix: all but the first dimension flattened, a vector as a column.
        is_matrix: whether it has rows that are owed nonzeros.
    """

    def __init__(self, parameter: Tensor) -> None:
        self.parameter = parameter
        self.is_matrix = parameter.ndim > 1
        width = parameter[0].numel() if self.is_matrix else 1
        self.shape = (parameter.shape[0], width)

    @property
    def numel(self) -> int:
        """Entries, zeros included."""
        return self.shape[0] * self.shape[1]

    def find(self) -> Tensor:
        """Positions of what is there: at first, of the nonzeros."""
        return self.parameter.flatten().nonzero().flatten()

    def read(self, live: Tensor) -> Tensor:
        """The values at the live positions."""
        return self.parameter.view(-1)[live]

    def write(self, live: Tensor, moving: Tensor | slice, values: Tensor) -> None:
        """Change the values of those of the live coordinates that ``moving`` selects."""
        self.parameter.view(-1)[live[moving]] = values.to(self.parameter.dtype)

    def settle(self, old: Tensor, live: Tensor, values: Tensor) -> LivePattern:
        """From now on only ``live`` is not zero.

        Args:
            old: positions that may not have been zero until now.
            values: at ``live``.
        """
        flat = self.parameter.view(-1)
        flat[old] = 0.0
        flat[live] = values.to(flat.dtype)
        return LivePattern(live, self.shape)

    def restore(self, live: Tensor) -> None:
        """Take over the positions of a loaded state."""


class NonzeroStorage:
    """The nonzeros of one matrix, in the layers that multiply them; zeros take no memory.

    Args:
        layers: those that share the ``values``: one, or several that are tied.
    """

    is_matrix = True

    def __init__(self, layers: Sequence[SparseWeight]) -> None:
        self.layers = list(layers)
        self.parameter = self.layers[0].values
        self.shape = self.layers[0].shape

    @property
    def numel(self) -> int:
        """Entries, zeros included."""
        return self.shape[0] * self.shape[1]

    def find(self) -> Tensor:
        """Positions of what is there."""
        return self.layers[0].csr.positions

    def read(self, live: Tensor) -> Tensor:
        """The values at the live positions."""
        return self.parameter.detach().clone()

    def write(self, live: Tensor, moving: Tensor | slice, values: Tensor) -> None:
        """Change the values of those of the live coordinates that ``moving`` selects."""
        self.parameter[moving] = values.to(self.parameter.dtype)

    def settle(self, old: Tensor, live: Tensor, values: Tensor) -> LivePattern:
        """From now on the layers hold ``live`` alone; see :class:`MatrixStorage`."""
        pattern = LivePattern(live, self.shape)
        self.parameter.data = values.to(self.parameter.dtype)
        for layer in self.layers:
            layer.columns, layer.row_starts = pattern.columns, pattern.row_starts
        return pattern

    def restore(self, live: Tensor) -> None:
        """Take over the positions of a loaded state; a file of nonzeros has lost those that are 0.

        Raises:
            ValueError: if the layers hold a nonzero that is not among them.
        """
        own = self.find()
        if torch.equal(own, live):
            return
        place = torch.searchsorted(live, own).clamp_(max=max(0, len(live) - 1))
        if len(own) > len(live) or not torch.equal(live[place], own):
            raise ValueError(
                f"the state is of other nonzeros ({len(live)}) than the layers hold ({len(own)}): "
                "load the weights and the optimizer of the same checkpoint."
            )
        values = self.parameter.new_zeros(len(live))
        values[place] = self.parameter.detach()
        self.settle(own, live, values)


Storage = MatrixStorage | NonzeroStorage
