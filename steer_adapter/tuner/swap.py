"""Another vector in the place of one that a model carries, while it runs."""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
from torch import nn

from steer_adapter.errors import AdapterNameError, ConfigError

from .config import SteerConfig, find_weights
from .layer import steer_layers
from .model import SteerModel
from .saved import read_vectors


SAME = ("layers_to_transform", "target_modules", "operation", "token_scope", "hidden_size", "num_hidden_layers")


def swap_vector(
    model: nn.Module, adapter_name: str, path: str | os.PathLike[str], subfolder: str | None = None, **hub_kwargs: Any
) -> None:
    """Put a saved vector in the place of a loaded one, in place: no module changes, and compiled code stays.

    The multiplier becomes that of the file. Everything is checked before anything is written.

    Args:
        model: a PeftModel, or a transformers model with natively loaded vectors.
        adapter_name: whose place it takes; the name stays.
        path: a folder with a saved vector, or the id of a repository.
        subfolder: of the folder or repository.
        hub_kwargs: for the Hub, e.g. `revision`, `token`.

    Raises:
        AdapterNameError: the model has no vector of this name.
        ConfigError: the two are not for the same layers, operation, scope and shape.
        VectorError: the file is damaged.
    """
    layers = [layer for layer in steer_layers(model) if adapter_name in layer.steer_vector]
    if not layers:
        known = sorted({name for layer in steer_layers(model) for name in layer.steer_vector})
        raise AdapterNameError(f"`adapter_name`: received {adapter_name!r}, expected one of {known}.")
    old = model.peft_config[adapter_name]
    new = SteerConfig.from_pretrained(str(path), subfolder=subfolder, **hub_kwargs)
    _check_same(old, new, adapter_name)
    file = find_weights(str(path), subfolder, hub_kwargs)
    if file is None:
        raise ConfigError(f"{path}: received an adapter config without weights beside it, expected a saved vector.")
    tensors = read_vectors(file, new.hidden_size, new.layers_to_transform)
    _write(model, SteerModel._remap_adapter_state_dict_for_load(model, new, adapter_name, tensors))
    for layer in layers:
        layer.set_multiplier(adapter_name, new.multiplier)
    # A copy: the object may be the caller's.
    model.peft_config[adapter_name] = changed = copy.copy(old)
    changed.multiplier = new.multiplier
    changed.provenance = new.provenance


def _check_same(old: SteerConfig, new: Any, adapter_name: str) -> None:
    if not isinstance(new, SteerConfig):
        raise ConfigError(f"swap_vector: received an adapter of type {new.peft_type}, expected a steering vector.")
    pairs = {name: (getattr(new, name), getattr(old, name)) for name in SAME}
    differing = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    if differing:
        raise ConfigError(
            f"swap_vector: the new vector and {adapter_name!r} differ in (received, expected) {differing}. Load it as "
            "an adapter of its own, with load_adapter."
        )


def _write(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    parameters = {name: parameter for name, parameter in model.named_parameters() if name in tensors}
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)
