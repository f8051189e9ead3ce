"""The header of a safetensors file, checked before a tensor is loaded.

The layout (https://github.com/huggingface/safetensors): eight bytes, the length n of the header as an unsigned
little-endian integer; n bytes of JSON that give dtype, shape and place of each tensor; the tensors, without gaps.
"""

from __future__ import annotations

import math
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steer_adapter.errors import ConfigError, VectorError

from .json_file import parse_json, shorten


MAX_HEADER = 1 << 20
MAX_DIMENSIONS = 8
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "C64": 64,
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """Where a tensor is, and what it is.

    Attributes:
        dtype: in the words of safetensors, e.g. `"F32"`.
        shape: of the tensor.
        start, end: in bytes from the end of the header.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: str | Path) -> dict[str, Entry]:
    """The tensors of a safetensors file by key, of which none is loaded.

    Raises:
        VectorError: it is no regular file, cut short, not safetensors, or its header contradicts itself or the file.
    """
    try:
        text, size = _read(path)
        entries = {
            key: _entry(key, value)
            for key, value in parse_json(text, "its header").items()
            if key != "__metadata__" or _check_metadata(value)
        }
        _check_layout(entries, size)
    except (ConfigError, ValueError, OSError) as error:
        raise VectorError(
            f"{path}: received a file that can't be read as safetensors ({error}), expected whole steering vectors. "
            "It may be cut short: save or download it again."
        ) from error
    return entries


def _read(path: str | Path) -> tuple[bytes, int]:
    """The header's bytes, and how many follow it."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("it is no regular file")
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if status.st_size < 8 or length > status.st_size - 8:
            raise ValueError(f"it has {status.st_size} bytes, fewer than its header says")
        if length > MAX_HEADER:
            raise ValueError(f"its header has {length} bytes, expected {MAX_HEADER} at most")
        return file.read(length), status.st_size - 8 - length


def _check_metadata(value: Any) -> bool:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise ValueError("its metadata is not a mapping of strings")
    return False


def _entry(key: str, value: Any) -> Entry:
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{shorten(key)} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise ValueError(f"{shorten(key)} has the dtype {shorten(dtype)}")
    if not _are_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"{shorten(key)} has the shape {shorten(shape)}")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"{shorten(key)} has the offsets {shorten(offsets)}")
    start, end = offsets
    if math.prod(shape) * BITS[dtype] != (end - start) * 8:
        raise ValueError(
            f"{shorten(key)}, {dtype} of shape {shorten(shape)}, does not fill the bytes {start} to {end}"
        )
    return Entry(dtype, tuple(shape), start, end)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 2**63 for size in value)


def _check_layout(entries: dict[str, Entry], size: int) -> None:
    """The tensors must cover the rest of the file, one after the other."""
    position = 0
    for entry in sorted(entries.values(), key=lambda e: (e.start, e.end)):
        if entry.start != position:
            raise ValueError(f"its tensors overlap or leave a gap at byte {position}")
        position = entry.end
    if position != size:
        raise ValueError(f"its tensors take {position} bytes, but {size} follow the header")
