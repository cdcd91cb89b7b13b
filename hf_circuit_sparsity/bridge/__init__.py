"""Bridges between a sparse and a dense model: use the one to explain, and steer, the other."""

from transformers import AutoConfig, AutoModelForCausalLM

from .bridge_config import BridgeTrainingArguments
from .bridge_trainer import BridgeTrainer
from .configuration_bridge import BridgeConfig
from .initialization import ridge_bridges_, standardize_bridges_
from .modeling_bridge import LOSS_TERMS, BridgedCausalLM, BridgeOutput, default_twin
from .steering import SteeringCandidate, SteeringSweep, steering_candidates, steering_sweep

AutoConfig.register(BridgeConfig.model_type, BridgeConfig, exist_ok=True)
AutoModelForCausalLM.register(BridgeConfig, BridgedCausalLM, exist_ok=True)

__all__ = [
    "LOSS_TERMS",
    "BridgeConfig",
    "BridgeOutput",
    "BridgeTrainer",
    "BridgeTrainingArguments",
    "BridgedCausalLM",
    "SteeringCandidate",
    "SteeringSweep",
    "default_twin",
    "ridge_bridges_",
    "standardize_bridges_",
    "steering_candidates",
    "steering_sweep",
]
