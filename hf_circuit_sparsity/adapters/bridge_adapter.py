"""A saved bridge as a PEFT adapter of its dense model."""

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from ..bridge.checkpoint import PEFT_TYPE, check_base
from ..bridge.configuration_bridge import BridgeConfig
from ..bridge.modeling_bridge import BridgedCausalLM

_PART = "bridge_parts."


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


class BridgeTuner(BaseTuner):
    """Holds a sparse twin and bridges beside a dense model, which runs as ever until it is steered.

    The model's own forward pass and `generate` are untouched. `bridged` is the
    [`BridgedCausalLM`] around it; [`steer`] is its method. Both are reached from the `PeftModel`.

    Raises:
        ValueError: the bridge was trained for another dense model.
    """

    prefix = "bridge_"
    tuner_layer_cls = BaseTunerLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Put a bridge beside `model`; called by PEFT."""
        peft_config = self.peft_config[adapter_name]
        config = BridgeConfig(**peft_config.bridge)
        check_base(config, model)
        bridged = BridgedCausalLM(config, model).to(next(model.parameters()).device)
        if peft_config.inference_mode:
            bridged.requires_grad_(False).eval()
        if not hasattr(self, "bridge_parts"):
            self.bridge_parts = nn.ModuleDict()
        self.bridge_parts[adapter_name] = bridged

    @property
    def bridged(self) -> BridgedCausalLM:
        """The active bridge with the dense model and the twin."""
        return self.bridge_parts[self.active_adapters[0]]

    def steer(self, *args: Any, **kwargs: Any) -> AbstractContextManager[BridgedCausalLM]:
        """See [`BridgedCausalLM.steer`]."""
        return self.bridged.steer(*args, **kwargs)

    def delete_adapter(self, adapter_name: str) -> None:
        """Take a bridge away again."""
        del self.peft_config[adapter_name], self.bridge_parts[adapter_name]
        self.active_adapter = next(iter(self.peft_config), [])

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("A bridge replaces no layer of the dense model.")

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        model.requires_grad_(False)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Nothing: the bridge was saved in the precision it was trained in."""

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        start = f"base_model.{_PART}{adapter_name}."
        bridged = model.base_model.bridge_parts[adapter_name]
        tied = {f"{start}sparse.{name}" for name in (bridged.sparse.all_tied_weights_keys or {})}
        return {
            name: tensor
            for name, tensor in state_dict.items()
            if name.startswith(start) and not name.startswith(f"{start}dense.") and name not in tied
        }

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return key.replace(f"base_model.{_PART}{adapter_name}.", f"base_model.{_PART}", 1)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict
    ) -> dict[str, torch.Tensor]:
        new = f"base_model.{_PART}{adapter_name}."
        return {k.replace(f"base_model.{_PART}", new, 1): v for k, v in state_dict.items()}
