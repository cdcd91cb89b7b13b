"""Configuration of a [`BridgedCausalLM`]: a sparse twin, and the dense model it belongs to."""

from typing import Any

from transformers import PreTrainedConfig

from ..modeling.configuration_circuitgpt import MAX_WIDTH, CircuitGPTConfig
from ..modeling.validation import CheckedConfig, Field


class BridgeConfig(CheckedConfig, PreTrainedConfig):
    """A sparse twin of a dense model and the bridges between the two (Gao et al. 2025).

    Args:
        sparse_config (`dict`): fields of the twin's `CircuitGPTConfig`.
        base_model_name_or_path (`str`): folder or Hub id of the dense model.
        base_model_revision (`str`, *optional*): its revision on the Hub.
        base_model_fingerprint (`str`): follows from its weights; see `model_fingerprint`.
        base_model_type (`str`): its `model_type`.
        base_width (`int`): width of its residual stream.
        encoder_afrac (`float`, *optional*): fraction of sparse channels that AbsTopK keeps at the
            end of an encoder; `None` keeps all.
        bridge_bias (`bool`): biases in encoders and decoders.

    Raises:
        ValueError: a field of another type or outside its range; from a file, an `ArtifactError`
            that also names the file.
    """

    model_type = "circuitgpt_bridge"

    sparse_config: dict | None = None
    base_model_name_or_path: str = ""
    base_model_revision: str | None = None
    base_model_fingerprint: str = ""
    base_model_type: str = ""
    base_width: int = 0
    encoder_afrac: float | None = 0.25
    bridge_bias: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.sparse_config, PreTrainedConfig):
            self.sparse_config = self.sparse_config.to_dict()
        self._check_types()
        afrac = self.encoder_afrac
        if afrac is not None and not 0 < afrac <= 1:
            raise ValueError(
                f"encoder_afrac={afrac} was passed, but the kept fraction must be in (0, 1]; use "
                "None to keep every channel."
            )
        kwargs.pop("auto_map", None)  # earlier versions saved their code beside a bridge
        super().__post_init__(**kwargs)

    def _check_types(self) -> None:
        def field(name: str) -> Field:
            return Field(getattr(self, name), type(self).__name__, name)

        for name in ("base_model_name_or_path", "base_model_type"):
            field(name).line()
        if self.base_model_revision is not None:
            field("base_model_revision").line()
        field("base_model_fingerprint").matching("([0-9a-f]{16})?", "16 hexadecimal digits")
        field("base_width").integer(0, MAX_WIDTH)
        field("bridge_bias").boolean()
        if self.encoder_afrac is not None:
            field("encoder_afrac").number()
        if self.sparse_config is not None:
            for _ in field("sparse_config").items():
                pass
            self.twin_config()

    def twin_config(self) -> CircuitGPTConfig:
        """The sparse twin's own config."""
        return CircuitGPTConfig(**(self.sparse_config or {}))


__all__ = ["BridgeConfig"]
