"""Configuration of a [`BridgedCausalLM`]: its sparse model, and the dense model it belongs to."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from ..modeling.configuration_circuitgpt import MAX_WIDTH, CheckedConfig, CircuitGPTConfig
from ..modeling.validation import Field


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
        StrictDataclassFieldValidationError: a field of another type.
        ValueError: a field outside its range.
        ArtifactError: either of these, in a file; names the file.
    """

    model_type = "circuitgpt_bridge"

    sparse_config: dict | PreTrainedConfig | None = None
    base_model_name_or_path: str = ""
    base_model_revision: str | None = None
    base_model_fingerprint: str = ""
    base_model_type: str = ""
    base_width: int = 0
    encoder_afrac: float | int | None = 0.25
    bridge_bias: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        def field(name: str) -> Field:
            return Field(getattr(self, name), type(self).__name__, name)

        for name in ("base_model_name_or_path", "base_model_type"):
            field(name).line()
        if self.base_model_revision is not None:
            field("base_model_revision").line()
        field("base_model_fingerprint").matching("([0-9a-f]{16})?", "16 hexadecimal digits")
        field("base_width").integer(0, MAX_WIDTH)
        if self.encoder_afrac is not None and not 0 < field("encoder_afrac").number() <= 1:
            raise ValueError(
                f"encoder_afrac={self.encoder_afrac} was passed, expected a fraction in (0, 1]; "
                "use None to keep every channel."
            )
        if not isinstance(self.sparse_config, CircuitGPTConfig):
            self.sparse_config = CircuitGPTConfig(**(self.sparse_config or {}))
        kwargs.pop("auto_map", None)  # earlier versions saved their code beside a bridge
        super().__post_init__(**kwargs)
