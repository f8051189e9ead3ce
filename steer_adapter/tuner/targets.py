"""Where vectors go in a model, and under which name; checked before anything is injected."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import AuxiliaryTrainingWrapper, TrainableTokensWrapper
from torch import nn

from steer_adapter.decoder import Decoder, find_decoder
from steer_adapter.errors import AdapterNameError, ConfigError, ModelError
from steer_adapter.files.names import revision_of
from steer_adapter.shapes import shape_at

from .config import SteerConfig
from .layer import SteerLayer
from .saved import PREFIX, check_place, checkpoint_key


# PeftModel's classes for these look for the trained head, which other methods name in `modules_to_save`.
HEAD_TASKS = ("TOKEN_CLS", "QUESTION_ANS")


def resolve(config: SteerConfig, model: nn.Module) -> tuple[SteerConfig, dict[str, int]]:
    """Check everything before anything is injected; the filled-in config, and hidden size by name of target."""
    if config.task_type in HEAD_TASKS:
        raise ConfigError(
            f"`task_type`: received {config.task_type!r}, for which PEFT needs a method that trains the model's head; "
            "a steering vector is nothing but its vectors. Leave task_type out: the model runs the same without it."
        )
    if "disk" in set((getattr(model, "hf_device_map", None) or {}).values()):
        raise ModelError(
            "The model has layers offloaded to disk. PEFT would rewrite the checkpoint of the base model in place to "
            "add an adapter, so this is refused. Load the model with device_map='cpu', or with CPU offload only."
        )
    if config.target_modules is None:
        decoder = find_decoder(model, config.stack)
        resolved = config.resolve(decoder, _name_of(model))
        names = [decoder.names[layer] for layer in resolved.layers_to_transform]  # type: ignore[union-attr]
    else:
        names, resolved = _resolve_names(config, model)
    if resolved.base_model_name_or_path is None:
        resolved.base_model_name_or_path = _name_of(model)
    if resolved.revision is None and not config.is_saved:
        resolved.revision = revision_of(_name_of(model))
    if resolved.saved_keys is not None:
        check_place(resolved.saved_keys, names, f"The adapter made for {config.base_model_name_or_path!r}")
        resolved.saved_keys = None
    modules = dict(model.named_modules())
    for name in names:
        if isinstance(modules[name], (nn.ModuleList, nn.ModuleDict)):
            raise ModelError(f"`target_modules`: {name} is a {type(modules[name]).__name__}, which no forward runs.")
        if not isinstance(getattr(modules[name], "steering", None), (SteerLayer, type(None))):
            raise ModelError(f"{name} already has a `steering` of its own, expected none. It can't be steered.")
    return resolved, dict.fromkeys(names, resolved.hidden_size or 0)


def _resolve_names(config: SteerConfig, model: nn.Module) -> tuple[list[str], SteerConfig]:
    try:
        names = [
            name
            for name, _ in model.named_modules()
            if name and ".steering" not in name and check_target_module_exists(config, name)
        ]
    except re.error as error:
        raise ConfigError(f"`target_modules`: received the regex {config.target_modules!r}: {error}.") from error
    if not names:
        raise ModelError(
            f"`target_modules`: received {config.target_modules!r}, which matches no module of "
            f"{type(model).__name__}. Expected names as in model.named_modules()."
        )
    model_config, width = shape_at(model, names[0])
    hidden_size = config.hidden_size or width
    if hidden_size is None:
        raise ConfigError(
            f"{type(model).__name__} has no config with a `hidden_size`; expected SteerConfig(hidden_size=...), the "
            "width of what the target modules return."
        )
    decoder = Decoder(tuple(names), hidden_size, getattr(model_config, "model_type", None))
    resolved = config.resolve(decoder, _name_of(model))
    resolved.layers_to_transform = None
    # Names, not a regex: one from a stranger could run for ever.
    resolved.target_modules = [checkpoint_key(f"{PREFIX}{name}").removeprefix(PREFIX) for name in names]
    return names, resolved


def _name_of(model: nn.Module) -> str | None:
    return getattr(model, "name_or_path", None) or None


def decoder_of(layer: str) -> str:
    """The path of the module that runs a decoder layer of this path: `model.layers.3` is run by `model`."""
    return layer.rpartition(".")[0].rpartition(".")[0]


def device_of(module: nn.Module) -> torch.device:
    """The device of a block; the CPU if all of it is on the meta device."""
    devices = (parameter.device for parameter in module.parameters() if not parameter.is_meta)
    return next(devices, torch.device("cpu"))


def check_name(adapter_name: object, model: nn.Module) -> None:
    """Refuse a name that can't be a key, or that something else in the model goes by.

    Raises:
        AdapterNameError: with the reason.
        ModelError: the model carries trained tokens.
    """
    # PEFT saves an adapter in a folder of its name.
    if not isinstance(adapter_name, str) or not adapter_name or any(c in adapter_name for c in "./\\\0"):
        raise AdapterNameError(f"adapter_name: received {adapter_name!r}, expected a name without dots and slashes.")
    for module in model.modules():
        if isinstance(module, SteerLayer) and module.library is not None and adapter_name in module.library:
            raise AdapterNameError(
                f"adapter_name: received {adapter_name!r}, which is a name in the library that the model carries. "
                "Choose another name."
            )
        if isinstance(module, SteerLayer) and adapter_name in module.steer_vector:
            raise AdapterNameError(
                f"adapter_name: received {adapter_name!r}, but the model carries a vector of that name. Choose "
                "another name, or take the vector off first, with delete_adapter(name) or unload()."
            )
        if isinstance(module, TrainableTokensWrapper):
            raise ModelError(
                "The model carries an adapter with `trainable_token_indices`, expected none: PEFT looks for its "
                "tokens in the file of any other adapter, and so can't save or load a vector. Merge that adapter with "
                "merge_and_unload() first, and put the vector on what that returns."
            )
        if isinstance(module, AuxiliaryTrainingWrapper) and adapter_name in module._adapters:
            raise AdapterNameError(
                f"adapter_name: received {adapter_name!r}, a name under which another adapter of the model keeps "
                "trained modules (modules_to_save). Choose another name."
            )


def check_key(adapter_name: str, targets: Iterable[str]) -> None:
    """PEFT sorts the keys of adapters by their names, so a name must not be part of the path to a vector."""
    parts = {part for target in targets for part in target.split(".")} | {"steering", "steer_vector"}
    if adapter_name in parts:
        raise AdapterNameError(
            f"adapter_name: received {adapter_name!r}, expected a name that is no part of a module's path: none of "
            f"{sorted(parts)}."
        )
