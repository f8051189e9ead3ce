"""Several vectors from one folder or repository, put on a model together."""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from torch import nn

from steer_adapter.errors import ConfigError, ModelError
from steer_adapter.tuner import SteerConfig
from steer_adapter.tuner.targets import check_key, check_name, resolve

from .source import adapters, fetch


def load_library(
    model: Any,
    name: str,
    names: list[str] | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> PeftModel:
    """Load all vectors of a folder or repository, or some by name. All are checked before the model is touched.

    Args:
        model: the base model, or a PeftModel that carries vectors already.
        name: a folder or a Hub id, with adapters in subfolders, as `save_pretrained` writes them.
        names: of the subfolders, `default` for an adapter at the top; all by default.
        revision, token: for the Hub.

    Returns:
        the PeftModel; the first vector that it ever got is active. `model.set_adapter(name)` switches.

    Raises:
        AdapterNameError: there is no adapter of a name, or the model carries one of that name.
        ConfigError, VectorError, ModelError: an adapter is broken, or does not fit the model.
    """
    found = adapters(fetch(name, revision, token), name, names)
    for adapter, folder in found.items():
        _check(model, adapter, SteerConfig.from_pretrained(str(folder)), str(folder))
    for adapter, folder in found.items():
        if isinstance(model, PeftModel):
            model.load_adapter(str(folder), adapter)
        else:
            model = PeftModel.from_pretrained(model, str(folder), adapter_name=adapter)
    return model


def _check(model: nn.Module, adapter: str, config: Any, folder: str) -> None:
    if not isinstance(config, SteerConfig):
        raise ConfigError(f"{folder}: received an adapter of type {config.peft_type}, expected a steering vector.")
    if isinstance(model, PeftModel) and not isinstance(model.active_peft_config, SteerConfig):
        raise ModelError(
            "Received a PeftModel with another adapter; load the first vector with PeftModel.from_pretrained."
        )
    base = model.base_model.model if isinstance(model, PeftModel) else model
    check_name(adapter, base)
    check_key(adapter, resolve(config, base)[1])
