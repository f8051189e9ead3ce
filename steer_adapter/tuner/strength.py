"""The dial: the live strength of vectors, on any model that carries them."""

from __future__ import annotations

import math
import numbers

from torch import nn

from steer_adapter.errors import AdapterNameError, ConfigError, ModelError

from .layer import SteerLayer


def set_multiplier(model: nn.Module, value: float, adapter_name: str | None = None) -> None:
    """Set the strength of steering vectors while a model runs. It is absolute, and never saved.

    Args:
        model (`nn.Module`): a [`~peft.PeftModel`], or a transformers model with natively loaded adapters.
        value (`float`): the multiplier: 1 as trained, 0 off, negative reversed.
        adapter_name (`str`, *optional*): whose multiplier; by default that of all active vectors.

    Raises:
        ConfigError: the value is not a finite number.
        AdapterNameError: there is no vector of this name.
        ModelError: the model carries no steering vector.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise ConfigError(f"`value`: received {value!r}, expected a finite number.")
    layers = [module for module in model.modules() if isinstance(module, SteerLayer)]
    if not layers:
        raise ModelError(f"{type(model).__name__} carries no steering vector. Add or load one first.")
    names = sorted({name for layer in layers for name in layer.steer_vector})
    if adapter_name is not None and adapter_name not in names:
        raise AdapterNameError(f"`adapter_name`: received {adapter_name!r}, expected one of {names}.")
    for layer in layers:
        for name in layer.active_adapters if adapter_name is None else [adapter_name]:
            if name in layer.steer_vector:
                layer.set_multiplier(name, float(value))
