"""What the values of a config may be, whoever wrote it."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING
from unicodedata import category

import torch

from steer_adapter.errors import ConfigError
from steer_adapter.files.json_file import shorten
from steer_adapter.operations import OPERATIONS

from .positions import SCOPES
from .provenance import check_provenance


if TYPE_CHECKING:
    from .config import SteerConfig

FORMAT_VERSION = 1
MAX_HIDDEN_SIZE = 1 << 20
MAX_TARGETS = 10_000
_PLAIN_NAME = re.compile(r"[\w.]+")


def check_values(config: SteerConfig) -> None:
    """Refuse values of the wrong type or out of range.

    Raises:
        ConfigError: with the name of the value, what was received and what was expected.
    """
    _check_format_version(config.format_version)
    _check_multiplier(config.multiplier)
    if config.operation not in list(OPERATIONS):
        raise ConfigError(
            f"`operation`: received {shorten(config.operation)}, expected one of {sorted(OPERATIONS)}. "
            "If it comes from a file, upgrade with: pip install -U steer-adapter"
        )
    _check_scope(config)
    _check_size("hidden_size", config.hidden_size, MAX_HIDDEN_SIZE)
    _check_size("num_hidden_layers", config.num_hidden_layers, MAX_TARGETS)
    for name in ("base_model_name_or_path", "revision", "model_type", "peft_version", "stack"):
        _check_text(name, getattr(config, name))
    for name in ("init_weights", "inference_mode"):
        if not isinstance(getattr(config, name), bool):
            raise ConfigError(f"`{name}`: received {shorten(getattr(config, name))}, expected True or False.")
    _check_auto_mapping(config.auto_mapping)
    _check_targets(config)
    check_provenance(config.provenance)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_format_version(version: object) -> None:
    if version is None:
        return
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ConfigError(
            f"`format_version`: received {shorten(version)}, expected an integer from 1 to {FORMAT_VERSION}."
        )
    if version > FORMAT_VERSION:
        raise ConfigError(
            f"`format_version`: received {shorten(version)}, but this steer-adapter reads up to {FORMAT_VERSION}. "
            "The adapter was saved by a newer version: pip install -U steer-adapter"
        )


def _check_multiplier(multiplier: object) -> None:
    if isinstance(multiplier, bool) or not isinstance(multiplier, (int, float)):
        raise ConfigError(f"`multiplier`: received {shorten(multiplier)}, expected a number.")
    # Compared before it is converted: an integer may be too large for a float.
    if not abs(multiplier) <= torch.finfo(torch.float32).max or not math.isfinite(multiplier):
        raise ConfigError(f"`multiplier`: received {shorten(multiplier)}, expected a finite number (float32).")


def _check_scope(config: SteerConfig) -> None:
    if config.token_scope not in SCOPES:
        raise ConfigError(f"`token_scope`: received {shorten(config.token_scope)}, expected one of {list(SCOPES)}.")
    if config.token_scope != "all" and config.target_modules is not None:
        raise ConfigError(
            f"`token_scope`: received {config.token_scope!r} with `target_modules`, expected 'all': the positions of "
            "tokens are known to the decoder of a transformers model only. Use `layers_to_transform`."
        )


def _check_size(name: str, value: object, limit: int) -> None:
    if value is not None and not (_is_int(value) and 0 < value <= limit):  # type: ignore[operator]
        raise ConfigError(f"`{name}`: received {shorten(value)}, expected a positive integer up to {limit}.")


def _check_text(name: str, value: object) -> None:
    if value is None:
        return
    # No control characters, which drive a terminal, and no halves of a surrogate pair, which can't be written.
    if not isinstance(value, str) or len(value) > 4096 or any(category(c) in ("Cc", "Cs") for c in value):
        raise ConfigError(f"`{name}`: received {shorten(value)}, expected a short text without control characters.")


def _check_auto_mapping(mapping: object) -> None:
    if mapping is None:
        return
    names = ("base_model_class", "parent_library")
    if not isinstance(mapping, dict) or not all(isinstance(mapping.get(name), str) for name in names):
        raise ConfigError(f"`auto_mapping`: received {shorten(mapping)}, expected texts for {list(names)}, or None.")


def _check_targets(config: SteerConfig) -> None:
    layers, targets = config.layers_to_transform, config.target_modules
    if layers is not None and targets is not None:
        raise ConfigError(
            f"Received both `layers_to_transform`={shorten(layers)} and `target_modules`={shorten(targets)}, expected "
            "one of them."
        )
    if layers is not None and not (_is_int(layers) or (isinstance(layers, list) and all(map(_is_int, layers)))):
        raise ConfigError(
            f"`layers_to_transform`: received {shorten(layers)}, expected an integer or a list of integers."
        )
    if config.stack == "":
        raise ConfigError(f"`stack`: received {shorten(config.stack)}, expected the path of a module, e.g. 'encoder'.")
    if config.stack is not None and targets is not None:
        raise ConfigError(
            f"Received both `stack`={shorten(config.stack)} and `target_modules`={shorten(targets)}, expected one of "
            "them."
        )
    if layers == [] or targets in ([], ""):
        raise ConfigError("Received an empty list of layers to steer, expected at least one, or None for all.")
    is_names = isinstance(targets, list) and all(isinstance(name, str) for name in targets)
    if targets is not None and not isinstance(targets, str) and not is_names:
        raise ConfigError(f"`target_modules`: received {shorten(targets)}, expected a string or a list of strings.")
    for wanted in (layers, targets):
        if isinstance(wanted, list) and len(wanted) > MAX_TARGETS:
            raise ConfigError(f"Received {len(wanted)} places to steer, expected at most {MAX_TARGETS}.")
    _check_layers_exist(config)
    if config.is_saved and isinstance(targets, str) and not _PLAIN_NAME.fullmatch(targets):
        raise ConfigError(
            f"`target_modules`: received the regex {shorten(targets)} from a file, expected a list of names. It could "
            "take for ever to match, so it is not tried."
        )


def _check_layers_exist(config: SteerConfig) -> None:
    """Of a saved config, which says how many layers there are."""
    layers, count = config.layers_to_transform, config.num_hidden_layers
    if not config.is_saved or count is None or layers is None:
        return
    outside = [layer for layer in ([layers] if isinstance(layers, int) else layers) if not -count <= layer < count]
    if outside:
        raise ConfigError(
            f"`layers_to_transform`: received {shorten(outside)}, but `num_hidden_layers` says {count}: expected "
            f"values from 0 to {count - 1}. The adapter's config contradicts itself."
        )
