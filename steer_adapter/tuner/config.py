"""The configuration of a steering vector, and what must hold before one touches a model."""

from __future__ import annotations

import copy
import math
import os
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft.config import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME

from steer_adapter.decoder import Decoder
from steer_adapter.errors import ConfigError, ModelError, VectorError
from steer_adapter.operations import OPERATIONS

from .positions import SCOPES
from .saved import read_vectors


FORMAT_VERSION = 1
_FILLED_IN = ("layers_to_transform", "hidden_size", "num_hidden_layers", "model_type", "base_model_name_or_path")


@dataclass
class SteerConfig(PeftConfig):
    """
    Configuration of a [`SteerModel`]: one vector of size `[hidden_size]` for each steered decoder layer.

    Args:
        layers_to_transform (`int` or `list[int]`, *optional*):
            The decoder layers to steer, counted from 0, or from the end if negative. Layer L is the output of decoder
            layer L. Defaults to all decoder layers. Saved resolved.
        target_modules (`str` or `list[str]`, *optional*):
            Instead of `layers_to_transform`: names of blocks (a regex, or a list of suffixes), for custom models. A
            block returns its hidden states as a tensor `[B, T, H]`, or as the first entry of a tuple.
        stack (`str`, *optional*):
            Which stack of layers `layers_to_transform` counts, for models with several: the path of the module that
            holds it, as in the transformers model, e.g. `"model.vision_tower"` or `"encoder"`. `hidden_size` and
            `num_hidden_layers` are then that stack's. Defaults to the text decoder.
        multiplier (`float`, defaults to 1.0):
            The initial strength. `set_multiplier` changes the live one, which is never saved.
        operation (`str`, defaults to `"add"`):
            What the vector does to the residual stream, a key of `steer_adapter.operations.OPERATIONS`.
        token_scope (`str`, defaults to `"all"`):
            The tokens to steer: `"all"`, `"prompt"` (every prompt token but the last) or `"completion"` (from the last
            prompt token on, which predicts the first completion token). Other than `"all"`, a vector needs the lengths
            of the prompts: from `generate` of the PeftModel, or from `steering(model, prompt_lengths=...)`.
        init_weights (`bool`, defaults to `True`):
            `True` starts a new vector at zero, `False` at random (standard normal).
        hidden_size, num_hidden_layers, model_type:
            The shape of the model that the vector belongs to. Filled in when the vector is added to a model, and
            checked when it is loaded. A custom model without a config needs `hidden_size` from you.
        format_version (`int`, *optional*):
            Version of the saved form. Written on save, `None` before.

    Raises:
        ConfigError: a value has the wrong type or is out of range, or the file is newer than this package.
    """

    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Decoder layers to steer, 0-based, negative from the end; default all."}
    )
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names of blocks to steer instead, for custom models."}
    )
    stack: str | None = field(
        default=None, metadata={"help": "Path of the module whose layers are counted; default the text decoder."}
    )
    multiplier: float = field(default=1.0, metadata={"help": "Initial strength."})
    operation: str = field(default="add", metadata={"help": "What the vector does to the residual stream."})
    token_scope: str = field(default="all", metadata={"help": "Tokens to steer: all, prompt or completion."})
    init_weights: bool = field(default=True, metadata={"help": "Start at zero (True) or at random (False)."})
    hidden_size: int | None = field(default=None, metadata={"help": "Width of the residual stream."})
    num_hidden_layers: int | None = field(default=None, metadata={"help": "Number of decoder layers of the model."})
    model_type: str | None = field(default=None, metadata={"help": "Text model type of the model."})
    format_version: int | None = field(default=None, metadata={"help": "Version of the saved form."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.lacks_weights_at: str | None = None
        # What was given and what was filled in for a model, where they may differ.
        self._filled: dict[str, tuple[Any, Any]] = {}
        from peft.utils import PeftType

        self.peft_type = PeftType("STEER")
        if isinstance(self.target_modules, (set, tuple)):
            self.target_modules = sorted(self.target_modules)
        _check_values(self)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """Load a config, and check the weights beside it, so that a damaged file is refused before any model changes.

        Raises:
            VectorError: the weights are cut short, not finite, or not steering vectors of the config's shape.
            ConfigError: the file does not say which version of the format it is.
        """
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        hub_kwargs, _, _ = cls._split_kwargs(kwargs)
        if not isinstance(config, SteerConfig):
            return config
        if config.format_version is None:
            raise ConfigError(f"{pretrained_model_name_or_path}: the adapter's config lacks `format_version`.")
        path = find_weights(pretrained_model_name_or_path, subfolder, hub_kwargs)
        if path is None:
            # A config alone may be read, but not put on a model.
            config.lacks_weights_at = str(pretrained_model_name_or_path)
        elif config.hidden_size is not None:
            layers = config.layers_to_transform
            read_vectors(path, config.hidden_size, layers if isinstance(layers, list) else None)
        return config

    @property
    def is_saved(self) -> bool:
        """Whether this config came from a file, so that its vectors are about to be loaded."""
        return self.format_version is not None

    def as_given(self) -> SteerConfig:
        """A copy with the values from before it was filled in for a model, but for those changed since."""
        config = copy.copy(self)
        for name, (given, filled) in self._filled.items():
            if getattr(self, name) == filled:
                setattr(config, name, given)
        config._filled = {}
        return config

    def filled_in(self, resolved: SteerConfig) -> SteerConfig:
        """The config for the books of a model: this very object with the resolved values, as with PEFT's methods.

        A copy if the object is that of a file, which may be loaded again, or of a model with other values.
        """
        if self.is_saved or (self._filled and self != resolved):
            return resolved
        given = self.as_given()
        self.__dict__.update(resolved.__dict__)
        self._filled = {name: (getattr(given, name), getattr(self, name)) for name in _FILLED_IN}
        return self

    def to_dict(self) -> dict[str, Any]:
        """What is saved, with the version of the format; so a config equals the one that its file gives."""
        return {**super().to_dict(), "format_version": FORMAT_VERSION}

    def resolve(self, decoder: Decoder, model_name: str | None) -> SteerConfig:
        """This config with its layers and shape filled in for a model, after checking that it fits.

        Raises:
            ModelError: the model has another hidden size or number of layers, or a layer is out of range.
        """
        if self.lacks_weights_at is not None:
            raise VectorError(
                f"{self.lacks_weights_at}: received an adapter config without {SAFETENSORS_WEIGHTS_NAME} beside it. "
                "Save or download the adapter again; pickled weights (.bin) are not read."
            )
        if self.is_saved:
            _check_shape(self, decoder, model_name)
        resolved = self.as_given()
        resolved.layers_to_transform = _resolve_layers(resolved.layers_to_transform, len(decoder))
        resolved.hidden_size = decoder.hidden_size
        resolved.num_hidden_layers = len(decoder)
        resolved.model_type = self.model_type if self.is_saved else decoder.model_type
        return resolved


def find_weights(name_or_path: str, subfolder: str | None, hub_kwargs: dict[str, Any]) -> str | None:
    """The adapter's safetensors file, fetched if it is on the Hub; `None` if there is none, which PEFT reports."""
    folder = os.path.join(name_or_path, subfolder or "")
    if os.path.isdir(folder):
        path = os.path.join(folder, SAFETENSORS_WEIGHTS_NAME)
        return path if os.path.exists(path) else None
    try:
        return hf_hub_download(name_or_path, SAFETENSORS_WEIGHTS_NAME, subfolder=subfolder, **hub_kwargs)
    except EntryNotFoundError:
        return None


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_values(config: SteerConfig) -> None:
    _check_format_version(config.format_version)
    if isinstance(config.multiplier, bool) or not isinstance(config.multiplier, (int, float)):
        raise ConfigError(f"`multiplier`: received {config.multiplier!r}, expected a number.")
    if not math.isfinite(config.multiplier):
        raise ConfigError(f"`multiplier`: received {config.multiplier}, expected a finite number.")
    if config.operation not in list(OPERATIONS):
        raise ConfigError(
            f"`operation`: received {config.operation!r}, expected one of {sorted(OPERATIONS)}. "
            "If it comes from a file, upgrade with: pip install -U steer-adapter"
        )
    if config.token_scope not in SCOPES:
        raise ConfigError(f"`token_scope`: received {config.token_scope!r}, expected one of {list(SCOPES)}.")
    if config.token_scope != "all" and config.target_modules is not None:
        raise ConfigError(
            f"`token_scope`: received {config.token_scope!r} with `target_modules`, expected 'all': the positions of "
            "tokens are known to the decoder of a transformers model only. Use `layers_to_transform`."
        )
    for name in ("hidden_size", "num_hidden_layers"):
        value = getattr(config, name)
        if value is not None and not (_is_int(value) and value > 0):
            raise ConfigError(f"`{name}`: received {value!r}, expected a positive integer.")
    _check_targets(config)


def _check_format_version(version: object) -> None:
    if version is None:
        return
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ConfigError(f"`format_version`: received {version!r}, expected an integer from 1 to {FORMAT_VERSION}.")
    if version > FORMAT_VERSION:
        raise ConfigError(
            f"`format_version`: received {version}, but this steer-adapter reads up to {FORMAT_VERSION}. "
            "The adapter was saved by a newer version: pip install -U steer-adapter"
        )


def _check_targets(config: SteerConfig) -> None:
    layers, targets = config.layers_to_transform, config.target_modules
    if layers is not None and targets is not None:
        raise ConfigError(
            f"Received both `layers_to_transform`={layers!r} and `target_modules`={targets!r}, expected one of them."
        )
    if layers is not None and not (_is_int(layers) or (isinstance(layers, list) and all(map(_is_int, layers)))):
        raise ConfigError(f"`layers_to_transform`: received {layers!r}, expected an integer or a list of integers.")
    if config.stack is not None and not (isinstance(config.stack, str) and config.stack):
        raise ConfigError(f"`stack`: received {config.stack!r}, expected the path of a module, e.g. 'encoder'.")
    if config.stack is not None and targets is not None:
        raise ConfigError(
            f"Received both `stack`={config.stack!r} and `target_modules`={targets!r}, expected one of them."
        )
    if layers == [] or targets in ([], ""):
        raise ConfigError("Received an empty list of layers to steer, expected at least one, or None for all.")
    is_names = isinstance(targets, list) and all(isinstance(name, str) for name in targets)
    if targets is not None and not isinstance(targets, str) and not is_names:
        raise ConfigError(f"`target_modules`: received {targets!r}, expected a string or a list of strings.")


def _check_shape(config: SteerConfig, decoder: Decoder, model_name: str | None) -> None:
    for name, received in (("hidden_size", decoder.hidden_size), ("num_hidden_layers", len(decoder))):
        expected = getattr(config, name)
        if expected is None:
            raise ConfigError(f"The adapter's config lacks `{name}`, so it can't be checked against the model.")
        if expected != received:
            raise ModelError(
                f"The adapter does not fit the model: the adapter, made for {config.base_model_name_or_path!r} "
                f"({config.model_type}), has {name}={expected}; the model {model_name!r} ({decoder.model_type}) has "
                f"{name}={received}. Load the vector on the model it was made for, or on one of the same shape."
            )


def _resolve_layers(layers: list[int] | int | None, count: int) -> list[int]:
    if layers is None:
        return list(range(count))
    wanted = [layers] if isinstance(layers, int) else layers
    outside = [layer for layer in wanted if not -count <= layer < count]
    if outside:
        raise ModelError(
            f"`layers_to_transform`: received {outside}, but the model has {count} decoder layers: expected values "
            f"from {-count} to {count - 1}."
        )
    return sorted({layer % count for layer in wanted})
