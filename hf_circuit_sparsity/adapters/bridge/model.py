"""A bridge as a PEFT adapter of its dense model."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from ...bridge.checkpoint import PREFIX, adapter_state_dict, check_base
from ...bridge.configuration_bridge import BridgeConfig
from ...bridge.modeling_bridge import BridgedCausalLM


class BridgeTuner(BaseTuner):
    """Holds a sparse model and bridges beside a dense model, which runs unchanged until steered.

    It replaces no layer. `bridged` is the [`BridgedCausalLM`] and [`steer`] its method; both are
    reached from the `PeftModel`.

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
        bridged.register_load_state_dict_post_hook(_expect_no_dense_weights)
        if not hasattr(self, "bridge_parts"):
            self.bridge_parts = nn.ModuleDict()
        self.bridge_parts[adapter_name] = bridged

    @property
    def bridged(self) -> BridgedCausalLM:
        """The active bridge with its dense and sparse models."""
        return self.bridge_parts[self.active_adapters[0]]

    def steer(self, *args: Any, **kwargs: Any) -> AbstractContextManager[BridgedCausalLM]:
        """See [`BridgedCausalLM.steer`]."""
        return self.bridged.steer(*args, **kwargs)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove a bridge."""
        del self.peft_config[adapter_name], self.bridge_parts[adapter_name]
        self.active_adapter = next(iter(self.peft_config), [])

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("A bridge replaces no layer of the dense model.")

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        model.requires_grad_(False)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Nothing: a bridge keeps the precision it was trained in."""

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        saved = adapter_state_dict(model.base_model.bridge_parts[adapter_name])
        names = [cls._with_adapter_name(name, adapter_name) for name in saved]
        return {name: state_dict[name] for name in names}

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return key.replace(f"{PREFIX}{adapter_name}.", PREFIX, 1)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict
    ) -> dict[str, torch.Tensor]:
        return {cls._with_adapter_name(name, adapter_name): w for name, w in state_dict.items()}

    @staticmethod
    def _with_adapter_name(key: str, adapter_name: str) -> str:
        return key.replace(PREFIX, f"{PREFIX}{adapter_name}.", 1)


def _expect_no_dense_weights(module: nn.Module, keys: Any) -> None:
    # PEFT warns of missing weights, but a bridge is saved without the dense model's.
    keys.missing_keys[:] = [key for key in keys.missing_keys if ".dense." not in key]
