"""PEFT methods of our own; importing this registers them, where PEFT (0.21 or newer) is installed.

A saved bridge attaches to its dense model with `PeftModel.from_pretrained`, and the weights of one
circuit are fine-tuned with `get_peft_model(model, CircuitPeftConfig.from_circuit(circuit, model))`.
"""

try:
    from .bridge_adapter import BridgePeftConfig, BridgeTuner
    from .circuit_adapter import CircuitPeftConfig, CircuitTuner
    from .registration import register_method
except ImportError:  # PEFT is not there, or too old
    __all__: list[str] = []
else:
    register_method(BridgePeftConfig.PEFT_TYPE, BridgePeftConfig, BridgeTuner)
    register_method(CircuitPeftConfig.PEFT_TYPE, CircuitPeftConfig, CircuitTuner)
    __all__ = ["BridgePeftConfig", "BridgeTuner", "CircuitPeftConfig", "CircuitTuner"]
