"""Making a method of our own known to PEFT."""

from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PeftConfig
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.tuners_utils import BaseTuner


def register_method(peft_type: str, config: type[PeftConfig], tuner: type[BaseTuner]) -> None:
    """Enter a method into the tables in which PEFT looks methods up. Does no harm twice.

    `peft.utils.register_peft_method` fills the same tables, but takes only names that are members
    of PEFT's own enum `PeftType` (as of 0.21). Those members are strings and compare as such, so a
    plain string is found just as well.
    """
    PEFT_TYPE_TO_CONFIG_MAPPING[peft_type] = config
    PEFT_TYPE_TO_TUNER_MAPPING[peft_type] = tuner
    PEFT_TYPE_TO_PREFIX_MAPPING[peft_type] = tuner.prefix
