"""Bridges between a sparse and a dense model: explain and steer the one by the other.

Importing this makes bridges known to the Auto classes of transformers; it loads no `Trainer`.
"""

from transformers import AutoConfig, AutoModelForCausalLM

from .configuration_bridge import BridgeConfig
from .modeling_bridge import BridgedCausalLM

AutoConfig.register(BridgeConfig.model_type, BridgeConfig, exist_ok=True)
AutoModelForCausalLM.register(BridgeConfig, BridgedCausalLM, exist_ok=True)

__all__ = ["BridgeConfig", "BridgedCausalLM"]
