"""How sparse a set of parameters is, and how fast its mask moves."""

from collections.abc import Iterable

import numpy as np
from torch import Tensor

# Number of set bits of every byte.
_BITS_SET = np.array([byte.bit_count() for byte in range(256)], dtype=np.uint8)


class SparsityMonitor:
    """Counts the nonzeros of parameters and compares their mask with the one of the last call.

    Works with any parameters, whatever optimizer trains them. Between calls it holds one bit per
    entry in main memory.

    Args:
        parameters: the tensors to watch.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self.parameters = list(parameters)
        self._masks = [_packed_mask(p) for p in self.parameters]

    def measure(self) -> dict[str, float]:
        """What there is now, against the last call (the first time: against the construction).

        Returns:
            ``nonzeros``: number of entries that are not zero. ``nonzero_fraction``: their share, in
            [0, 1]. ``mask_churn``: the share of them that were zero at the last call, in [0, 1].
        """
        nonzeros, born = 0, 0
        for i, parameter in enumerate(self.parameters):
            mask = _packed_mask(parameter)
            nonzeros += _count(mask)
            born += _count(mask & ~self._masks[i])
            self._masks[i] = mask
        total = sum(p.numel() for p in self.parameters)
        return {
            "nonzeros": nonzeros,
            "nonzero_fraction": nonzeros / max(1, total),
            "mask_churn": born / max(1, nonzeros),
        }


def _packed_mask(parameter: Tensor) -> np.ndarray:
    return np.packbits((parameter.detach() != 0).cpu().numpy())


def _count(mask: np.ndarray) -> int:
    return int(_BITS_SET[mask].sum(dtype=np.int64))
