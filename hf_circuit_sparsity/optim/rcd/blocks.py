"""Which coordinates of a matrix a step of random coordinate descent looks at.

A block is some rows, some columns or some single entries of a matrix *as stored*: the weight of
`nn.Linear` is stored outputs × inputs, that of transformers' `Conv1D` inputs × outputs. Drawing
one costs what the block and the nonzeros cost, never what the matrix costs.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ...modeling.csr import CSR

Selection = Literal["uniform", "magnitude", "gradient", "cyclic"]
BlockKind = Literal["rows", "columns", "entries"]
SELECTIONS: tuple[str, ...] = get_args(Selection)
BLOCK_KINDS: tuple[str, ...] = get_args(BlockKind)

# torch.multinomial takes no more categories; a vocabulary may have more rows.
_MULTINOMIAL_LIMIT = 1 << 24


@dataclass(frozen=True)
class Block:
    """Some coordinates of a matrix, all of equal standing.

    Attributes:
        shape: of the matrix as stored.
        dim: 0 if `ids` are rows of the stored matrix, 1 if they are its columns, None if they are
            flat positions.
        ids: int64, ascending, on the matrix's device.
    """

    shape: tuple[int, int]
    dim: int | None
    ids: Tensor

    @property
    def numel(self) -> int:
        """Number of coordinates."""
        return len(self.ids) * (1 if self.dim is None else self.shape[1 - self.dim])

    def index(self) -> Tensor:
        """Flat positions of the coordinates, `(numel,)` int64, in the order of the block.

        The order is that of the block cut out of the matrix and flattened; all that is said of a
        block's coordinates one by one follows it.
        """
        return self.index_at(torch.arange(self.numel, device=self.ids.device))

    def index_at(self, at: Tensor) -> Tensor:
        """Flat positions of the coordinates at some positions within the block; see [`index`]."""
        if self.dim is None:
            return self.ids[at]
        if self.dim == 0:
            width = self.shape[1]
            return self.ids[at // width] * width + at % width
        count = len(self.ids)
        return (at // count) * self.shape[1] + self.ids[at % count]

    def take_rows(self, chosen: Tensor, row_dim: int) -> Tensor:
        """Whether each coordinate of the block lies in a chosen row, flat.

        Args:
            chosen: per entry of dimension `row_dim` of the matrix, bool.
        """
        if self.dim is None:
            return chosen[self.ids // self.shape[1] if row_dim == 0 else self.ids % self.shape[1]]
        own = chosen[self.ids] if self.dim == row_dim else chosen
        other = len(self.ids) if self.dim != row_dim else self.shape[1 - row_dim]
        own = own[:, None].expand(-1, other) if row_dim == 0 else own.expand(other, -1)
        return own.reshape(-1)

    def take(self, matrix: Tensor) -> Tensor:
        """The entries of `matrix` (of any shape with as many entries) in the block, flat."""
        if self.dim is None:
            return matrix.reshape(-1)[self.ids]
        return matrix.reshape(self.shape).index_select(self.dim, self.ids).flatten()

    def locate(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Where coordinates lie in the block.

        Args:
            index: flat positions in the matrix, `(n,)` int64.

        Returns:
            `inside`, `(n,)` bool, and the position within the block of those that are inside.
        """
        width = self.shape[1]
        if self.dim is None:
            if not len(self.ids):
                return torch.zeros_like(index, dtype=torch.bool), index[:0]
            at = torch.searchsorted(self.ids, index).clamp_(max=len(self.ids) - 1)
            inside = self.ids[at] == index
            return inside, at[inside]
        number = torch.full((self.shape[self.dim],), -1, device=index.device)
        number[self.ids] = torch.arange(len(self.ids), device=index.device)
        row, column = index // width, index % width
        along = number[row if self.dim == 0 else column]
        inside = along >= 0
        if self.dim == 0:
            return inside, (along * width + column)[inside]
        return inside, (row * len(self.ids) + along)[inside]


def block_size(size: int, fraction: float) -> int:
    """How many of `size` rows, columns or entries a block holds: at least one, if any."""
    return max(1, round(size * fraction)) if fraction else 0


def draw_block(
    nonzeros: CSR,
    dim: int | None,
    fraction: float,
    settings: dict[str, Any],
    number: int,
    generator: torch.Generator,
) -> Block:
    """Draw a block of a matrix, as `settings["selection"]` says; see [`RCDConfig`].

    * `"uniform"`: every row, column or entry is as likely as every other.
    * `"magnitude"` (MB-RCD): with a probability of `(1 - floor) * s / sum(s) + floor / size`,
      where `s` is the sum of `|x| ** power` over the row, column or entry. A step does not depend
      on how likely it was, so what is minimized is the same as with the others; a zero is drawn
      `floor` times as often as uniformly, and so takes up to `1 / floor` times as long to grow.
    * `"cyclic"`: one after the other.
    * `"gradient"` draws uniformly; which of the block's coordinates move is decided when their
      gradients are known.

    Args:
        nonzeros: of the matrix as stored.
        dim: see [`Block`].
        fraction: share of the matrix, in [0, 1]; 0 for an empty block.
        number: how many blocks have been drawn before; places the cyclic ones.
        generator: on the CPU.
    """
    shape, device = nonzeros.shape, nonzeros.positions.device
    size = shape[0] * shape[1] if dim is None else shape[dim]
    count = block_size(size, fraction)
    if count == 0:
        return Block(shape, dim, torch.empty(0, dtype=torch.int64, device=device))
    if settings["selection"] == "cyclic":
        ids = (number * count + torch.arange(count)) % size
    elif settings["selection"] == "magnitude" and len(nonzeros):
        ids = _by_magnitude(nonzeros, dim, size, count, settings, generator)
    else:
        ids = _uniform(size, count, generator)
    return Block(shape, dim, ids.sort().values.to(device))


def _uniform(size: int, count: int, generator: torch.Generator) -> Tensor:
    """`count` different numbers below `size`."""
    if count * 4 > size:
        return torch.randperm(size, generator=generator)[:count]
    found = torch.randint(size, (count + count // 4 + 8,), generator=generator).unique()
    while len(found) < count:
        more = torch.randint(size, (count,), generator=generator)
        found = torch.cat([found, more]).unique()
    return found[torch.randperm(len(found), generator=generator)[:count]]


def _by_magnitude(
    nonzeros: CSR,
    dim: int | None,
    size: int,
    count: int,
    settings: dict[str, Any],
    generator: torch.Generator,
) -> Tensor:
    floor, width = settings["magnitude_floor"], nonzeros.shape[1]
    weight = nonzeros.values.double().abs().pow(settings["magnitude_power"]).cpu()
    total = float(weight.sum())
    if total == 0.0 or not math.isfinite(total):
        return _uniform(size, count, generator)
    owner = nonzeros.positions.cpu()
    if dim is not None:
        owner = owner // width if dim == 0 else owner % width
    if (dim is not None or count * 4 > size) and size <= _MULTINOMIAL_LIMIT:
        score = torch.zeros(size, dtype=torch.float64).index_add_(0, owner, weight)
        probability = (1.0 - floor) * score / total + floor / size
        return torch.multinomial(probability, count, generator=generator)
    if count == size:
        return torch.arange(size)
    # They are too many to list a probability for each, so it is decided first which draws go to the
    # nonzeros. What is drawn twice is drawn again.
    cumulative = weight.cumsum(0)
    found = torch.empty(0, dtype=torch.int64)
    while len(found) < count:
        n = count - len(found)
        evenly = int((torch.rand(n, generator=generator) < floor).sum())
        drawn = [torch.randint(size, (evenly,), generator=generator)]
        if n > evenly:
            dice = torch.rand(n - evenly, generator=generator, dtype=torch.float64)
            at = torch.searchsorted(cumulative, dice * cumulative[-1])
            drawn.append(owner[at.clamp_(max=len(owner) - 1)])
        found = torch.cat([found, *drawn]).unique()
    return found
