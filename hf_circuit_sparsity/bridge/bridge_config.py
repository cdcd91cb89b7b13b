"""The settings of :class:`BridgeTrainer`: what it adds to ``SparseTrainingArguments``."""

from dataclasses import dataclass, field

from ..trainer.sparse_config import SparseTrainingArguments
from .modeling_bridge import LOSS_TERMS

BRIDGE_PARAMETERS = "bridges.*"


@dataclass
class BridgeTrainingArguments(SparseTrainingArguments):
    """Arguments of :class:`BridgeTrainer`; everything else is as in ``SparseTrainingArguments``.

    The terms of the loss are those of Gao et al. 2025 (bridges), all of weight 1 by default. Works
    with ``HfArgumentParser``.

    Raises:
        ValueError: if a value is out of range.
    """

    # --- The terms of the loss ---
    lm_weight: float = field(
        default=1.0, metadata={"help": "Weight of the sparse twin's own language-model loss."}
    )
    kl_weight: float = field(default=1.0, metadata={"help": "Weight of KL(dense || sparse)."})
    nmse_weight: float = field(
        default=1.0,
        metadata={
            "help": "Weight of the normalized squared error of encoding and decoding, mean over "
            "all locations."
        },
    )
    dense_to_sparse_weight: float = field(
        default=1.0,
        metadata={
            "help": "Weight of KL(dense || hybrid) for runs that go from the dense model to the "
            "sparse twin."
        },
    )
    sparse_to_dense_weight: float = field(
        default=1.0,
        metadata={
            "help": "Weight of KL(dense || hybrid) for runs that go from the sparse twin to the "
            "dense model."
        },
    )
    hybrid_locations: int = field(
        default=1,
        metadata={
            "help": "Locations at which hybrid runs switch, drawn anew for every step and each of "
            "the two directions; 0 for no hybrid runs."
        },
    )

    standardize_bridges: bool = field(
        default=True,
        metadata={
            "help": "Whether bridges that have no units yet get those of the dense stream from the "
            "first batch; see standardize_bridges_."
        },
    )

    # --- Which parameters are sparse ---
    sparse_bridges: bool = field(
        default=False,
        metadata={"help": "Whether encoders and decoders become as sparse as the twin."},
    )

    def __post_init__(self) -> None:
        for term in LOSS_TERMS:
            weight = getattr(self, f"{term}_weight")
            if not 0.0 <= weight < float("inf"):
                raise ValueError(f"{term}_weight={weight} is not a number >= 0.")
        if not any(self.loss_weights().values()):
            raise ValueError("all weights of the loss are 0: leave at least one above.")
        count = self.hybrid_locations
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise ValueError(f"hybrid_locations={count!r} is not a whole number >= 0.")
        super().__post_init__()
        if not self.sparse_bridges:
            dense = list(self.dense_parameters or [])
            if BRIDGE_PARAMETERS not in dense:
                self.dense_parameters = [*dense, BRIDGE_PARAMETERS]

    def loss_weights(self) -> dict[str, float]:
        """The weight of every term, by its name."""
        return {term: getattr(self, f"{term}_weight") for term in LOSS_TERMS}
