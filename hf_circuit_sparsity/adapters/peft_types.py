"""What PEFT needs for every method of this package: a member of its enum, and a config that knows
the weights it was saved with."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftType
from peft.utils import SAFETENSORS_WEIGHTS_NAME

from ..files import sha256_of
from ..modeling.configuration_circuitgpt import ArtifactError


@dataclass
class WholeAdapterConfig(PeftConfig):
    """A config that is not read beside the weights of another save.

    PEFT writes the weights first. A save that is stopped in between leaves weights whose hash is
    not the one in the config.

    Attributes:
        weights_sha256: of the weights it was saved with; empty if there were none beside it.
    """

    weights_sha256: str = field(
        default="", metadata={"help": "Hash of the weights that belong to this config."}
    )

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """As PEFT's, which calls it once the weights are there."""
        weights = Path(save_directory) / SAFETENSORS_WEIGHTS_NAME
        self.weights_sha256 = sha256_of(weights) if weights.is_file() else ""
        super().save_pretrained(str(save_directory), **kwargs)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> "WholeAdapterConfig":
        """As PEFT's. What comes from the Hub is of one commit.

        Raises:
            ArtifactError: (a `ValueError`) the weights beside it are those of another save.
        """
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)
        weights = Path(pretrained_model_name_or_path, subfolder or "", SAFETENSORS_WEIGHTS_NAME)
        expected = config.weights_sha256
        if expected and weights.is_file() and sha256_of(weights) != expected:
            raise ArtifactError(
                weights,
                " is not the one that adapter_config.json beside it was saved with, as after a "
                "save that was interrupted; save the adapter again, or copy both.",
            )
        return config


def peft_type(name: str) -> PeftType:
    """The member of that name; it is added, as PEFT (0.21) has no way to register another's."""
    if name not in PeftType.__members__:
        member = str.__new__(PeftType, name)
        member._name_ = member._value_ = name
        type.__setattr__(PeftType, name, member)
        PeftType._member_map_[name] = PeftType._value2member_map_[name] = member
        PeftType._member_names_.append(name)
    return PeftType[name]
