"""The settings of [`BridgeTrainer`]: what it adds to [`SparseTrainingArguments`]."""

import math
from dataclasses import dataclass

from ..optim.settings import check, is_whole
from ..trainer.sparse_config import SparseTrainingArguments, with_help
from .losses import LOSS_TERMS

BRIDGE_PARAMETERS = "bridges.*"


@with_help
@dataclass
class BridgeTrainingArguments(SparseTrainingArguments):
    """Arguments of [`BridgeTrainer`]; the others are those of [`SparseTrainingArguments`].

    The terms of the loss are those of Gao et al. 2025 (bridges). Works with `HfArgumentParser`.

    Args:
        lm_weight (`float`, defaults to 1): weight of the sparse model's language-model loss.
        kl_weight (`float`, defaults to 1): weight of KL(dense || sparse).
        nmse_weight (`float`, defaults to 1): weight of the normalized squared error of encoding and
            decoding, mean over locations.
        dense_to_sparse_weight (`float`, defaults to 1): weight of KL(dense || hybrid) for runs
            from the dense to the sparse model.
        sparse_to_dense_weight (`float`, defaults to 1): weight of KL(dense || hybrid) for runs
            from the sparse to the dense model.
        hybrid_locations (`int`, defaults to 1): locations at which hybrid runs switch models, drawn
            anew for every step and direction; 0 for no hybrid runs.
        standardize_bridges (`bool`, defaults to `True`): whether bridges that are not standardized
            yet are standardized by the first batch.
        sparse_bridges (`bool`, defaults to `False`): whether encoders and decoders become as sparse
            as the sparse model.

    Raises:
        ValueError: a value out of range.
    """

    lm_weight: float = 1.0
    kl_weight: float = 1.0
    nmse_weight: float = 1.0
    dense_to_sparse_weight: float = 1.0
    sparse_to_dense_weight: float = 1.0
    hybrid_locations: int = 1
    standardize_bridges: bool = True
    sparse_bridges: bool = False

    def __post_init__(self) -> None:
        for term, weight in self.loss_weights().items():
            check(f"{term}_weight", weight, 0.0 <= weight < math.inf, "a finite number >= 0")
        if not any(self.loss_weights().values()):
            raise ValueError("all weights of the loss are 0: leave at least one above.")
        count = self.hybrid_locations
        check("hybrid_locations", count, is_whole(count, 0), "a whole number >= 0")
        if self.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor={self.label_smoothing_factor} was passed, but the terms "
                "of a bridge's loss are not smoothed: leave it at 0."
            )
        if self.distillation_weight:
            raise ValueError(
                f"distillation_weight={self.distillation_weight} was passed, but a bridge's own "
                "term for that is kl_weight: leave it at 0."
            )
        super().__post_init__()
        if not self.sparse_bridges:
            dense = list(self.exclude_parameters or [])
            if BRIDGE_PARAMETERS not in dense:
                self.exclude_parameters = [*dense, BRIDGE_PARAMETERS]

    def _less_is_better(self) -> bool:
        return True  # losses, errors and divergences

    def loss_weights(self) -> dict[str, float]:
        """The weight of every term, by its name."""
        return {term: getattr(self, f"{term}_weight") for term in LOSS_TERMS}
