"""Several vectors from one folder or repository, put on a model together."""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from torch import nn

from steer_adapter.tuner import SteerConfig, SteerModel
from steer_adapter.tuner.targets import check_key, check_name, resolve

from .source import adapters, fetch, load_config


def load_adapters(
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
        _check(model, adapter, load_config(folder))
    for adapter, folder in found.items():
        if carries_vectors(model):
            model.load_adapter(str(folder), adapter)
        else:
            model = PeftModel.from_pretrained(model, str(folder), adapter_name=adapter)
    return model


def carries_vectors(model: nn.Module) -> bool:
    """Whether a model is a PeftModel of vectors, and not of a LoRA, around which another is put."""
    return isinstance(model, PeftModel) and isinstance(model.base_model, SteerModel)


def _check(model: Any, adapter: str, config: SteerConfig) -> None:
    base = model.base_model.model if carries_vectors(model) else model
    check_name(adapter, base)
    check_key(adapter, resolve(config, base)[1])
