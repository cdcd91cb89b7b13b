"""Members of PEFT's enum of methods for those of this package."""

from peft import PeftType


def peft_type(name: str) -> PeftType:
    """The member of that name; it is added, as PEFT (0.21) has no way to register another's."""
    if name not in PeftType.__members__:
        member = str.__new__(PeftType, name)
        member._name_ = member._value_ = name
        type.__setattr__(PeftType, name, member)
        PeftType._member_map_[name] = PeftType._value2member_map_[name] = member
        PeftType._member_names_.append(name)
    return PeftType[name]
