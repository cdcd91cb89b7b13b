"""The config of a bridge as a PEFT adapter."""

from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig

from ...bridge.checkpoint import PEFT_TYPE


@dataclass
class BridgePeftConfig(PeftConfig):
    """What `adapter_config.json` of a bridge holds.

    Attributes:
        bridge: the fields of its [`BridgeConfig`].
    """

    PEFT_TYPE = PEFT_TYPE

    bridge: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "The fields of the BridgeConfig."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
