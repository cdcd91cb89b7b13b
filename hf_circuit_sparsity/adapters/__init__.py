"""PEFT methods of this package; importing this makes them known to PEFT (0.21 or newer).

`PeftModel.from_pretrained` attaches a saved bridge to its dense model, and
`get_peft_model(model, CircuitPeftConfig.from_circuit(circuit, model))` fine-tunes one circuit.

Raises:
    ImportError: PEFT is not installed, or too old.
"""

try:
    from peft import utils as peft_utils
except ImportError as error:
    raise ImportError(
        f"hf_circuit_sparsity.adapters needs PEFT 0.21 or newer ({error}); "
        "pip install -U 'hf-circuit-sparsity[peft]'."
    ) from error

from .bridge.config import BridgePeftConfig
from .bridge.model import BridgeTuner
from .circuit.config import CircuitPeftConfig
from .circuit.model import CircuitTuner

for _config, _tuner in ((BridgePeftConfig, BridgeTuner), (CircuitPeftConfig, CircuitTuner)):
    peft_utils.register_peft_method(
        name=_config.PEFT_TYPE.lower(), config_cls=_config, model_cls=_tuner, prefix=_tuner.prefix
    )

__all__ = ["BridgePeftConfig", "BridgeTuner", "CircuitPeftConfig", "CircuitTuner"]
