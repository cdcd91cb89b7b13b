"""The config of a bridge as a PEFT adapter."""

from dataclasses import dataclass, field
from typing import Any

from ...bridge.checkpoint import PEFT_TYPE
from ..peft_types import WholeAdapterConfig, peft_type


@dataclass
class BridgePeftConfig(WholeAdapterConfig):
    """What `adapter_config.json` of a bridge holds.

    Attributes:
        bridge: the fields of its [`BridgeConfig`].
    """

    PEFT_TYPE = peft_type(PEFT_TYPE)

    bridge: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "The fields of the BridgeConfig."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = self.PEFT_TYPE
