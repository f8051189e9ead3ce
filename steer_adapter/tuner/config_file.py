"""The config file of an adapter, also while PEFT does not know yet whose it is.

PEFT opens a config to see its method, and parses it as it comes: a small file may nest deeper than Python goes, a
large one may take twenty times its size. Part of registering a method with PEFT is therefore that a file that names it
is read with the limits of [`~steer_adapter.files.json_file.read_json`], on each of PEFT's routes. What loads of other
methods loads as before; what can't be loaded by any is an error that names the file.
"""

from __future__ import annotations

import mmap
import os
import re
from functools import wraps
from pathlib import Path
from typing import Any

import peft
from peft.config import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

from steer_adapter.errors import ConfigError, UnknownMethodError, VectorError
from steer_adapter.files.json_file import read_json, shorten


_MARK = "_reads_steering_vectors"


def _json_string(text: str) -> bytes:
    """A pattern for a string in JSON, where each character may be written as an escape."""
    return b'"%s"' % b"".join(rb"(?:%c|\\u00(?i:%02x))" % (code, code) for code in text.encode())


_OURS = re.compile(_json_string("peft_type") + rb"\s*:\s*" + _json_string("STEER"))


def read_config(path: str | Path) -> dict[str, Any]:
    """The object in a config file, within limits.

    Raises:
        ConfigError: it is no config of an adapter, or see [`~steer_adapter.files.json_file.read_json`].
        VectorError: the weights beside it are no regular file.
    """
    values = read_json(path)
    _check_weights_beside(path)
    _check_method(values.get("peft_type"), path)
    _check_arguments(values, path)
    values.pop("runtime_config", None)  # as PEFT does
    return values


def names_us(path: str | Path) -> bool:
    """Whether a config file says that it is a steering vector's; of any size, for it is neither parsed nor copied."""
    if not os.path.isfile(path) or not os.path.getsize(path):
        return False
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _OURS.search(data) is not None


def guard_reading() -> None:
    """Make PEFT read configs whose method it has yet to find out by the rules of this module. Once is enough."""
    if getattr(PeftConfig, _MARK, False):
        return
    config: Any = PeftConfig
    config.from_json_file = classmethod(_reading(config.from_json_file.__func__))
    config._get_peft_type = classmethod(_finding_method(config._get_peft_type.__func__))
    setattr(config, _MARK, True)


def _reading(read: Any) -> Any:
    @wraps(read)
    def from_json_file(cls: type[PeftConfig], path_json_file: str, **kwargs: Any) -> Any:
        if cls is not PeftConfig:  # the method is known, and it is another's
            return read(cls, path_json_file, **kwargs)
        if names_us(path_json_file):
            return read_config(path_json_file)
        try:
            values = read(cls, path_json_file, **kwargs)
        except (ValueError, TypeError, RecursionError) as error:
            raise _no_config(path_json_file, error) from error
        if not isinstance(values, dict):
            raise _no_config(path_json_file, f"JSON of type {type(values).__name__}")
        if "peft_type" in values:
            _check_method(values["peft_type"], path_json_file)
        _check_arguments(values, path_json_file)
        return values

    return from_json_file


def _finding_method(find: Any) -> Any:
    @wraps(find)
    def _get_peft_type(cls: type[PeftConfig], model_id: str, **kwargs: Any) -> Any:
        try:
            return find(cls, model_id, **kwargs)
        except UnknownMethodError:
            raise
        except KeyError as error:
            raise UnknownMethodError(
                f"{model_id}: received an adapter config without {error}, which says what kind of adapter it is. Save "
                "or download the adapter again."
            ) from error

    return _get_peft_type


def _check_weights_beside(path: str | Path) -> None:
    """transformers opens them by itself, and would wait for ever at the end of a pipe."""
    for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME):
        weights = os.path.join(os.path.dirname(path), name)
        if os.path.exists(weights) and not os.path.isfile(weights):
            raise VectorError(f"{weights}: received something that is no regular file, expected one.")


def _check_method(peft_type: object, path: str | Path) -> None:
    if not isinstance(peft_type, str) or peft_type not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise UnknownMethodError(
            f"{path}: received `peft_type` {shorten(peft_type)}, expected a method of PEFT {peft.__version__} or of "
            "an imported package that adds one. Upgrade PEFT, import that package, or download the adapter again."
        )


def _check_arguments(values: dict[str, Any], path: str | Path) -> None:
    """PEFT passes them to methods of the config by keyword."""
    if {"cls", "self"} & values.keys():
        raise ConfigError(f"{path}: received {shorten(values)}, expected the config of a PEFT adapter.")


def _no_config(path: str | Path, what: object) -> ConfigError:
    return ConfigError(
        f"{path}: received what can't be read as the config of a PEFT adapter ({shorten(str(what))}), expected a JSON "
        "object. Save or download the adapter again."
    )
