"""How sparse a set of parameters is, and how fast its mask moves."""

from collections.abc import Iterable

import numpy as np
from torch import Tensor

from ..modeling.sparse_layers import SparseWeight

# Number of set bits of every byte.
_BITS_SET = np.array([byte.bit_count() for byte in range(256)], dtype=np.uint8)


class SparsityMonitor:
    """Counts the nonzeros of parameters and compares their mask with the one of the last call.

    Works with any parameters, whatever optimizer trains them. Between calls it holds one bit per
    entry in main memory, of layers that hold only their nonzeros eight bytes per nonzero.

    Args:
        parameters: the tensors to watch, or such layers.
    """

    def __init__(self, parameters: Iterable[Tensor | SparseWeight]) -> None:
        self.parameters = list(parameters)
        self._masks = [_mask(p) for p in self.parameters]

    def measure(self) -> dict[str, float]:
        """What there is now, against the last call (the first time: against the construction).

        Returns:
            ``nonzeros``: number of entries that are not zero. ``nonzero_fraction``: their share, in
            [0, 1]. ``mask_churn``: the share of them that were zero at the last call, in [0, 1].
        """
        nonzeros = born = total = 0
        for i, parameter in enumerate(self.parameters):
            mask, before = _mask(parameter), self._masks[i]
            if isinstance(parameter, SparseWeight):
                nonzeros += len(mask)
                born += len(mask) - len(np.intersect1d(mask, before, assume_unique=True))
                total += parameter.shape[0] * parameter.shape[1]
            else:
                nonzeros += _count(mask)
                born += _count(mask & ~before)
                total += parameter.numel()
            self._masks[i] = mask
        return {
            "nonzeros": nonzeros,
            "nonzero_fraction": nonzeros / max(1, total),
            "mask_churn": born / max(1, nonzeros),
        }


def _mask(parameter: Tensor | SparseWeight) -> np.ndarray:
    """One bit per entry, packed; of a layer that holds nonzeros, their flat positions."""
    if isinstance(parameter, SparseWeight):
        flat = parameter.csr.positions
        return flat[parameter.values.detach() != 0].cpu().numpy()
    return np.packbits((parameter.detach() != 0).cpu().numpy())


def _count(mask: np.ndarray) -> int:
    return int(_BITS_SET[mask].sum(dtype=np.int64))
