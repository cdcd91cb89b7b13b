"""The model. `import hf_circuit_sparsity` registers it with transformers' Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from . import causal_lm  # noqa: F401 (makes Conv1D one of the layers that run on nonzeros)
from .blocks import run_blocks
from .configuration_circuitgpt import ACTIVATION_SITES, CircuitGPTConfig
from .modeling_circuitgpt import CircuitGPTForCausalLM, CircuitGPTModel, NodeSite

CircuitGPTModel.run_blocks = run_blocks
AutoConfig.register(CircuitGPTConfig.model_type, CircuitGPTConfig, exist_ok=True)
AutoModel.register(CircuitGPTConfig, CircuitGPTModel, exist_ok=True)
AutoModelForCausalLM.register(CircuitGPTConfig, CircuitGPTForCausalLM, exist_ok=True)
# With these, save_pretrained writes the model's code beside its weights (auto_map), so that people
# without this package load it with trust_remote_code=True.
CircuitGPTConfig.register_for_auto_class()
CircuitGPTModel.register_for_auto_class("AutoModel")
CircuitGPTForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = [
    "ACTIVATION_SITES",
    "CircuitGPTConfig",
    "CircuitGPTForCausalLM",
    "CircuitGPTModel",
    "NodeSite",
]
