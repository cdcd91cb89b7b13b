"""Configuration of a [`BridgedCausalLM`]: its sparse model, and the dense model it belongs to."""

import re
from typing import Any

from huggingface_hub.dataclasses import strict, validated_field
from transformers import PreTrainedConfig

from ..modeling.configuration_circuitgpt import MAX_WIDTH, CheckedConfig, CircuitGPTConfig, within


def _check_line(value: Any) -> None:
    if isinstance(value, str) and not (value.isprintable() and len(value) <= 4096):
        raise ValueError("expected one line of printable characters")


def _check_fingerprint(value: Any) -> None:
    if not re.fullmatch("([0-9a-f]{16})?", value):
        raise ValueError("expected 16 hexadecimal digits")


@strict
class BridgeConfig(CheckedConfig, PreTrainedConfig):
    """A sparse model of the same depth as a dense one, and the bridges between the two.

    Args:
        sparse_config (`CircuitGPTConfig` or `dict`, *optional*): the sparse model's config.
        base_model_name_or_path (`str`): folder or Hub id of the dense model.
        base_model_revision (`str`, *optional*): its revision on the Hub.
        base_model_fingerprint (`str`): `model_fingerprint` of its weights.
        base_model_type (`str`): its `model_type`.
        base_width (`int`): width of its residual stream.
        encoder_afrac (`float`, *optional*): fraction of sparse channels that AbsTopK keeps at the
            end of an encoder; `None` keeps all.
        bridge_bias (`bool`): biases in encoders and decoders.

    Raises:
        StrictDataclassFieldValidationError: a field of another type or outside its range.
        ArtifactError: the same in a file; names the file.
    """

    model_type = "circuitgpt_bridge"

    sparse_config: dict | PreTrainedConfig | None = None
    base_model_name_or_path: str = validated_field(_check_line, default="")
    base_model_revision: str | None = validated_field(_check_line, default=None)
    base_model_fingerprint: str = validated_field(_check_fingerprint, default="")
    base_model_type: str = validated_field(_check_line, default="")
    base_width: int = within(0, MAX_WIDTH, default=0)
    encoder_afrac: float | int | None = within(0, 1, default=0.25)
    bridge_bias: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        if not isinstance(self.sparse_config, CircuitGPTConfig):
            self.sparse_config = CircuitGPTConfig(**(self.sparse_config or {}))
        kwargs.pop("auto_map", None)  # earlier versions saved their code beside a bridge
        super().__post_init__(**kwargs)
