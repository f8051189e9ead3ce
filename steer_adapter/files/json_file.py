"""Reading JSON that a stranger wrote."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from steer_adapter.errors import ConfigError


MAX_BYTES = 1 << 20
MAX_DEPTH = 16


def read_json(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ConfigError: it is no regular file, above 1 MiB, not JSON, not an object, nested more than 16 levels deep, or
            holds a key twice.
    """
    return parse_json(read_regular(path, MAX_BYTES), str(path))


def read_regular(path: str | Path, limit: int) -> bytes:
    """The contents of a regular file of at most `limit` bytes; a pipe or a device would be read for ever.

    Raises:
        ConfigError: it is something else, larger, or can't be read.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise ConfigError(f"{path}: received something that is no regular file, expected one.")
        if status.st_size > limit:
            raise ConfigError(f"{path}: received {status.st_size} bytes, expected at most {limit}.")
        with open(path, "rb") as file:
            return file.read(limit)
    except OSError as error:
        raise ConfigError(f"{path}: received a file that can't be read ({error}).") from error


def parse_json(text: bytes, source: str) -> dict[str, Any]:
    """The object in a JSON text.

    Args:
        text: UTF-8.
        source: where it comes from, for messages.

    Raises:
        ConfigError: as `read_json`.
    """
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except RecursionError as error:
        raise ConfigError(f"{source}: received JSON nested too deep, expected {MAX_DEPTH} levels at most.") from error
    except ValueError as error:
        raise ConfigError(f"{source}: received what can't be read as JSON ({error}). Download it again.") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{source}: received JSON of type {type(value).__name__}, expected an object.")
    if _depth_exceeds(value, MAX_DEPTH):
        raise ConfigError(f"{source}: received JSON nested too deep, expected {MAX_DEPTH} levels at most.")
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {shorten(key)} stands there twice")
        result[key] = value
    return result


def _depth_exceeds(value: Any, limit: int) -> bool:
    level: list[Any] = [value]
    for _ in range(limit):
        level = [inner for outer in level for inner in _children(outer)]
        if not level:
            return False
    return True


def _children(value: Any) -> Iterable[Any]:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [item for item in inner if isinstance(item, (dict, list))]


def shorten(value: object, limit: int = 200) -> str:
    """`repr`, cut where it gets long: what a stranger wrote may fill a terminal."""
    if isinstance(value, int) and abs(value) >= 10**limit:
        return f"an integer of {value.bit_length()} bits"
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python prints, inside a list
        return f"a {type(value).__name__} with huge integers"
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
