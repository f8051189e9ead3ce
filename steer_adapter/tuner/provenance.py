"""Where a vector comes from: the record in its config, which says what a stranger needs and changes nothing."""

from __future__ import annotations

import math
from typing import Any

import peft
import torch
import transformers

from steer_adapter.errors import ConfigError
from steer_adapter.files.json_file import shorten
from steer_adapter.version import __version__


# Keys that are read by this package, and their types; others are kept as they are. docs/format.md describes them.
KEYS: dict[str, tuple[type, ...]] = {
    "versions": (dict,),
    "method": (str,),
    "behavior": (str,),
    "license": (str,),
    "seed": (int,),
    "data": (dict,),
    "trained_on": (str,),
    "chat": (bool,),
    "hyperparameters": (dict,),
    "residual_norms": (dict,),
    "margins": (dict,),
    "held_out": (dict,),
    "side_effects": (dict,),
}
MAX_DEPTH = 4
MAX_VALUES = 2000


def versions() -> dict[str, str]:
    """Of this package and those that a vector's numbers depend on."""
    return {
        "steer_adapter": __version__,
        "peft": peft.__version__,
        "transformers": transformers.__version__,
        "torch": str(torch.__version__),
    }


def check_provenance(provenance: object) -> None:
    """Refuse a record that is not what it should be.

    Raises:
        ConfigError: a value of the wrong type, too many of them, or a number that is not finite.
    """
    if provenance is None:
        return
    if not isinstance(provenance, dict):
        raise ConfigError(f"`provenance`: received {shorten(provenance)}, expected a mapping.")
    for key, types in KEYS.items():
        value = provenance.get(key)
        if value is not None and (not isinstance(value, types) or (bool not in types and isinstance(value, bool))):
            raise ConfigError(
                f"`provenance`: {key} is {shorten(value)}, expected {' or '.join(t.__name__ for t in types)}."
            )
    if _count(provenance, MAX_DEPTH) > MAX_VALUES:
        raise ConfigError(f"`provenance`: received more than {MAX_VALUES} values.")
    _check_numbers("residual_norms", provenance.get("residual_norms") or {}, smallest=0.0)
    for multiplier, measured in (provenance.get("margins") or {}).items():
        if not isinstance(measured, dict) or not _is_number(multiplier):
            raise ConfigError(f"`provenance`: margins hold {shorten({multiplier: measured})}, expected measurements.")
        _check_numbers("margins", measured)


def _check_numbers(name: str, values: dict[str, Any], smallest: float = -math.inf) -> None:
    for key, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e30 or value < smallest:
            raise ConfigError(f"`provenance`: {name} hold {shorten({key: value})}, expected finite numbers.")


def _is_number(text: object) -> bool:
    try:
        return math.isfinite(float(text))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False


def _count(value: object, depth: int) -> int:
    """How many values there are, inside one another."""
    if isinstance(value, dict):
        inner = list(value.values())
        if not all(isinstance(key, str) for key in value):
            raise ConfigError(f"`provenance`: received {shorten(value)}, expected names as keys.")
    elif isinstance(value, (list, tuple)):
        inner = list(value)
    elif value is None or isinstance(value, (str, bool, int)) or (isinstance(value, float) and math.isfinite(value)):
        return 1
    else:
        raise ConfigError(f"`provenance`: received {shorten(value)}, expected text, numbers, lists and mappings.")
    if depth == 0:
        raise ConfigError(f"`provenance`: received more than {MAX_DEPTH} levels.")
    return 1 + sum(_count(item, depth - 1) for item in inner)
