"""The one place that touches PEFT's registry: adds `STEER` to its closed enum of methods and to its
tables, and has files that name it read with care."""

from __future__ import annotations

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType, register_peft_method

from steer_adapter.errors import SteerError

from .config import SteerConfig
from .config_file import guard_reading
from .model import SteerModel


NAME = "STEER"


def register() -> None:
    """Register the tuner with PEFT. Calling it again does nothing.

    Raises:
        SteerError: PEFT, or another package, already has a method of this name.
    """
    if NAME in PeftType.__members__:
        owner = PEFT_TYPE_TO_CONFIG_MAPPING.get(PeftType(NAME))
        if owner is SteerConfig:
            return
        raise SteerError(
            f"PEFT already has a method {NAME!r} ({owner}), expected none. steer-adapter does not overwrite it: "
            "uninstall the other package, or use a PEFT version that this steer-adapter was tested with."
        )
    _extend_peft_type()
    register_peft_method(name=NAME.lower(), config_cls=SteerConfig, model_cls=SteerModel)
    guard_reading()


def _extend_peft_type() -> None:
    """Add a member to the enum the way `enum` itself does: lookup by value, by name, by attribute, and pickling."""
    member = str.__new__(PeftType, NAME)
    member._name_ = NAME
    member._value_ = NAME
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType.__members__)
    type.__setattr__(PeftType, NAME, member)
    PeftType._member_names_.append(NAME)
    PeftType._member_map_[NAME] = member
    PeftType._value2member_map_[NAME] = member
