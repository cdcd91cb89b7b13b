"""What random coordinate descent knows of one sparse parameter, and where its weights lie.

Positions are flat int64 indices into the matrix as stored, ascending.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ...modeling.csr import CSR
from ...modeling.sparse_layers import SparseWeight
from ..keep_largest import positions_of
from .blocks import Block, draw_block
from .distributed import RCDProcessGroup, part_of

MOMENTS = ("exp_avg", "exp_avg_sq", "age")
_BLOCK_STATISTICS = ("block_sum", "block_square")
_NUMBERS = ("draws", "stayed", "seen", "zeros_ratio")


class SparseState:
    """The state of a sparse parameter that torch holds as a whole, zeros and all.

    A step goes through it in this order: gradients come in ([`add_gradient`]), the active
    coordinates move ([`write`]), the block's gradient is remembered ([`remember_block`]); at the
    end of a block's stay coordinates grow and drop ([`assign`]) and the next block is drawn
    ([`draw`]).

    Args:
        parameter: contiguous, of any shape.
        group: its parameter group.
        saved: what [`to_dict`] returned, or nothing.
        process_group: the processes that share its coordinates.
        averages: whether this process computes the gradient at all active coordinates
            nevertheless.

    Attributes:
        shape: as a matrix: all but the first dimension flattened, a vector as a column.
        is_matrix: whether it has rows with a minimum of nonzeros.
        pattern: where the active coordinates are; without values.
        moments: at the active coordinates: `exp_avg`, `exp_avg_sq`, and `age`, the number of steps
            taken; empty for plain gradient descent.
        drawn: the current block, of all processes.
        gradient: what the coming step uses: at `own_pattern` (None: not known) and in `own_block`.
        draws: number of blocks drawn.
        stayed: number of steps of the current block.
        seen: number of gradients summed in `block_sum`.
        block_sum, block_square: sums of the gradients in `own_block` and of their squares.
        move_active: whether coordinates outside the block move.
        zeros_ratio: running mean of the mean square gradient of zeros over that of nonzeros.
    """

    def __init__(
        self,
        parameter: Tensor,
        group: dict[str, Any],
        saved: dict[str, Any] | None = None,
        process_group: RCDProcessGroup | None = None,
        averages: bool = False,
    ) -> None:
        self.parameter = parameter
        self.process_group, self.averages = process_group, averages
        self.move_active: bool = group["move_active"]
        self._attach()
        self.gradient: tuple[Tensor | None, Tensor] | None = None
        self.moments: dict[str, Tensor] = {}
        self.drawn: Block | None = None
        self.draws = self.stayed = self.seen = 0
        self.block_sum: Tensor | None = None
        self.block_square: Tensor | None = None
        self.zeros_ratio: float | None = None
        if saved:
            self._restore(saved, group)
            return
        self.pattern = self._find()
        if group["update"] == "adam":
            zeros = torch.zeros(len(self.pattern), dtype=self.dtype, device=parameter.device)
            age = torch.zeros_like(zeros, dtype=torch.int32)
            self.moments = {"exp_avg": zeros, "exp_avg_sq": zeros.clone(), "age": age}

    @property
    def rests(self) -> bool:
        """Whether the current block is empty."""
        return not len(self.drawn.ids)

    @property
    def numel(self) -> int:
        """Entries, zeros included."""
        return self.shape[0] * self.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """In what moments are held and steps computed: float32 at least."""
        return torch.promote_types(self.parameter.dtype, torch.float32)

    @property
    def active(self) -> Tensor:
        """Positions of the active coordinates."""
        return self.pattern.positions

    @cached_property
    def own_pattern(self) -> CSR:
        """The active coordinates whose gradient this process computes."""
        if self.process_group is None or self.averages:
            return self.pattern
        return CSR.from_positions(self.active[self._part(len(self.active))], self.shape)

    @cached_property
    def own_block(self) -> Block:
        """The part of the block whose gradient this process computes."""
        ids = self.drawn.ids
        return Block(self.shape, self.drawn.dim, ids[self._part(len(ids))])

    @cached_property
    def active_in_block(self) -> tuple[Tensor, Tensor]:
        """Which of the active coordinates are in `own_block`, and where there."""
        return self.own_block.locate(self.active)

    def values(self) -> Tensor:
        """The weights at the active coordinates, in `dtype`."""
        return self.parameter.view(-1)[self.active].to(self.dtype)

    def write(self, moving: Tensor | slice, values: Tensor) -> None:
        """Set the weights at those of the active coordinates that `moving` selects."""
        self.parameter.view(-1)[self.active[moving]] = values.to(self.parameter.dtype)

    def assign(self, active: Tensor, values: Tensor, moments: dict[str, Tensor]) -> None:
        """From now on only `active` is not zero."""
        flat = self.parameter.view(-1)
        flat[self.active] = 0.0
        flat[active] = values.to(flat.dtype)
        self._set_pattern(active, moments)

    @torch.no_grad()
    def add_gradient(self, active: Tensor | None, block: Tensor) -> None:
        """Add to the gradient of the coming step.

        Args:
            active: gradient at `own_pattern`; None where nonzeros outside the block do not move.
            block: gradient in `own_block`, flat, in its order.
        """
        if self.gradient is not None:
            before = self.gradient
            active = active if before[0] is None else before[0] + active
            block = before[1] + block
        self.gradient = (active, block)

    def remember_block(self, gradient: Tensor) -> None:
        """Add a gradient in `own_block` to what is remembered of its stay."""
        self.seen += 1
        if self.block_sum is None:
            self.block_sum = gradient
            return
        if self.block_square is None:  # that of the first follows from the sum
            self.block_square = self.block_sum.square()
        self.block_sum += gradient
        self.block_square += gradient.square()

    def draw(self, group: dict[str, Any], fraction: float, generator: torch.Generator) -> None:
        """Draw the next block, `fraction` of the parameter."""
        nonzeros = CSR.from_positions(self.active, self.shape, self.values())
        dim = self._block_dim(group)
        block = draw_block(nonzeros, dim, fraction, group, self.draws, generator)
        self._set_block(block)
        self.draws += 1
        self.stayed = self.seen = 0
        self.block_sum = self.block_square = None

    def rows(self, positions: Tensor, row_dim: int) -> Tensor:
        """The output neurons that coordinates belong to."""
        return positions // self.shape[1] if row_dim == 0 else positions % self.shape[1]

    def to_dict(self) -> dict[str, Any]:
        """The state as tensors and numbers, to be saved. In-flight gradients are left out."""
        saved: dict[str, Any] = {"live": self.active, **self.moments}
        if self.drawn is not None:
            saved["block"] = self.drawn.ids
        for name in (*_NUMBERS, *_BLOCK_STATISTICS):
            if getattr(self, name) is not None:
                saved[name] = getattr(self, name)
        return saved

    def _restore(self, saved: dict[str, Any], group: dict[str, Any]) -> None:
        device = self.parameter.device
        saved = {
            n: v.to(device, self.dtype if v.is_floating_point() else v.dtype)
            if isinstance(v, Tensor)
            else v
            for n, v in saved.items()
        }
        self.moments = {name: saved[name] for name in MOMENTS if name in saved}
        self._adopt(saved["live"])
        self._set_block(Block(self.shape, self._block_dim(group), saved["block"]))
        for name in _NUMBERS:
            setattr(self, name, saved.get(name, getattr(self, name)))
        for name in _BLOCK_STATISTICS:
            setattr(self, name, saved.get(name))
        known = self.block_sum
        if known is not None and (
            self.process_group is not None or len(known) != self.own_block.numel
        ):
            # One process's state was saved; what the others had seen of the block is gone.
            self.seen, self.block_sum, self.block_square = 0, None, None

    def _part(self, n: int) -> slice:
        own = self.process_group
        return slice(None) if own is None else part_of(n, own.rank, own.size)

    def _block_dim(self, group: dict[str, Any]) -> int | None:
        """Which dimension of the stored matrix blocks are cut from; see [`Block`]."""
        if group["block"] == "entries" or not self.is_matrix:
            return None
        return group["row_dim"] if group["block"] == "rows" else 1 - group["row_dim"]

    def _set_pattern(self, active: Tensor, moments: dict[str, Tensor]) -> None:
        self.pattern, self.moments = CSR.from_positions(active, self.shape), moments
        for name in ("own_pattern", "active_in_block"):
            self.__dict__.pop(name, None)

    def _set_block(self, block: Block) -> None:
        self.drawn = block
        for name in ("own_block", "active_in_block"):
            self.__dict__.pop(name, None)

    # Where the weights lie: what the nonzeros of layers do differently.

    def _attach(self) -> None:
        self.is_matrix = self.parameter.ndim > 1
        rows = self.parameter.shape[0] if self.is_matrix else self.parameter.numel()
        self.shape = (rows, self.parameter.numel() // rows)

    def _find(self) -> CSR:
        return CSR.from_positions(positions_of(self.parameter.detach().view(-1) != 0), self.shape)

    def _adopt(self, active: Tensor) -> None:
        """Take over saved positions."""
        self.pattern = CSR.from_positions(active, self.shape)


class NonzeroState(SparseState):
    """The state of the nonzeros of a matrix, held by the layers that multiply them.

    Args:
        layers: those that share the parameter as their `values`: one, or several that are tied.
    """

    def __init__(self, layers: Sequence[SparseWeight], *args: Any, **kwargs: Any) -> None:
        self.layers = list(layers)
        super().__init__(*args, **kwargs)

    def values(self) -> Tensor:
        return self.parameter.detach().to(self.dtype, copy=True)

    def write(self, moving: Tensor | slice, values: Tensor) -> None:
        self.parameter[moving] = values.to(self.parameter.dtype)

    def assign(self, active: Tensor, values: Tensor, moments: dict[str, Tensor]) -> None:
        self._set_pattern(active, moments)
        csr = self.pattern.with_values(values)
        for layer in self.layers:
            layer.assign(csr)

    def _attach(self) -> None:
        self.is_matrix = True
        self.shape = self.layers[0].shape

    def _find(self) -> CSR:
        return CSR.from_positions(self.layers[0].csr.positions, self.shape)

    def _adopt(self, active: Tensor) -> None:
        # A file of nonzeros has lost those that are 0.
        own = self.layers[0].csr.positions
        self.pattern = CSR.from_positions(active, self.shape)
        if torch.equal(own, active):
            return
        index = torch.searchsorted(active, own).clamp_(max=max(0, len(active) - 1))
        if len(own) > len(active) or not torch.equal(active[index], own):
            raise ValueError(
                f"the state is of other nonzeros ({len(active)}) than the layers hold "
                f"({len(own)}): load the weights and the optimizer of the same checkpoint."
            )
        values = self.parameter.new_zeros(len(active))
        values[index] = self.parameter.detach()
        self.assign(active, values, self.moments)
