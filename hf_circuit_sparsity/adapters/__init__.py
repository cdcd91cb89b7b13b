"""PEFT methods of this package; importing this makes them known to PEFT (0.21 or newer).

`PeftModel.from_pretrained` attaches a saved bridge to its dense model, and
`get_peft_model(model, CircuitPeftConfig.from_circuit(circuit, model))` fine-tunes one circuit.

Raises:
    ImportError: PEFT is not installed, or too old.
"""

try:
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
except ImportError as error:
    raise ImportError(
        f"hf_circuit_sparsity.adapters needs PEFT 0.21 or newer ({error}); pip install -U peft."
    ) from error

from .bridge.config import BridgePeftConfig
from .bridge.model import BridgeTuner
from .circuit.config import CircuitPeftConfig
from .circuit.model import CircuitTuner

# `peft.utils.register_peft_method` fills the same tables, but takes only members of PEFT's own enum
# `PeftType` (as of 0.21). Those are strings, so a plain string is found just as well.
for _config, _tuner in ((BridgePeftConfig, BridgeTuner), (CircuitPeftConfig, CircuitTuner)):
    PEFT_TYPE_TO_CONFIG_MAPPING[_config.PEFT_TYPE] = _config
    PEFT_TYPE_TO_TUNER_MAPPING[_config.PEFT_TYPE] = _tuner
    PEFT_TYPE_TO_PREFIX_MAPPING[_config.PEFT_TYPE] = _tuner.prefix

__all__ = ["BridgePeftConfig", "BridgeTuner", "CircuitPeftConfig", "CircuitTuner"]
