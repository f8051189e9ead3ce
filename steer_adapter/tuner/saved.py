"""The saved form of a vector: what its file may hold, and where its keys belong in a model."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from safetensors import SafetensorError, safe_open

from steer_adapter.errors import VectorError
from steer_adapter.files.header import read_header
from steer_adapter.files.json_file import shorten


T = TypeVar("T")
PREFIX = "base_model.model."
# Wrappers that put themselves into the keys of a state dict; the path in the unwrapped model has none of them.
WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
_KEY = re.compile(r"^base_model\.model\.(?P<path>.+)\.steering\.steer_vector\Z")
_LAYER = re.compile(r"\.([0-9]{1,6})\.steering\.steer_vector\Z")
# What a vector may be saved as, in the words of safetensors.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def checkpoint_key(key: str) -> str:
    """The key as it is saved: `base_model.model.` at most once, however many tuners and wrappers there are."""
    for wrapper in WRAPPERS:
        key = key.replace(wrapper, "")
    while key.startswith(PREFIX * 2):
        key = key.removeprefix(PREFIX)
    return key


def place_of(key: str) -> str:
    """The decoder layer that a checkpoint key is for, or else the path of its module."""
    match = _LAYER.search(key)
    return match[1] if match else key.removeprefix(PREFIX).removesuffix(".steering.steer_vector")


def match_by_layer(missing: Iterable[str], unused: Iterable[str]) -> dict[str, str]:
    """Pair checkpoint keys that a model lacks with those that a file has, by layer index: `{file key: model key}`.

    For a vector whose model names its decoder layers differently, e.g. a text model inside a multimodal one.
    """
    by_layer = {match[1]: key for key in missing if (match := _LAYER.search(key))}
    return {
        key: by_layer[match[1]] for key in unused if (match := _LAYER.search(key)) is not None and match[1] in by_layer
    }


def without_embeddings(tensors: Mapping[str, T], source: str) -> dict[str, T]:
    """The tensors (or what is known of them) but for embedding layers.

    PEFT adds those to any adapter once a vocabulary has been resized. A vector has no use for them, and they would
    overwrite those of the model: they are left out, with a warning.
    """
    extra = {key for key in tensors if key.rpartition(".")[0].rpartition(".")[2] in EMBEDDING_LAYER_NAMES}
    if extra:
        warnings.warn(
            f"{source}: the embedding layers {shorten(sorted(extra))} came along with the steering vector and are "
            "left out.",
            stacklevel=2,
        )
    return {key: tensor for key, tensor in tensors.items() if key not in extra}


def layer_of(key: str) -> int:
    """The index of the decoder layer in a key, -1 without one."""
    match = _LAYER.search(key)
    return int(match[1]) if match else -1


def check_described(
    described: Mapping[str, tuple[object, Iterable[int]]], hidden_size: int, count: int | None, source: str
) -> None:
    """Refuse what can't be the steering vectors of one model, by dtype and shape alone.

    Args:
        described: dtype and shape of each tensor, by key.
        hidden_size: H; each tensor must be `[H]` and floating point.
        count: how many vectors are expected, if known.
        source: where they come from, for messages.

    Raises:
        VectorError: a foreign key, two keys for one place, another shape or dtype, vectors missing.
    """
    for key, (dtype, shape) in described.items():
        if not _KEY.match(key):
            raise VectorError(
                f"{source}: received the key {shorten(key)}, expected only keys like "
                "'base_model.model.<decoder layer>.steering.steer_vector'. The file is not a steering vector."
            )
        if list(shape) != [hidden_size] or dtype not in DTYPES.values():
            raise VectorError(
                f"{source}: {shorten(key)} is {dtype} of shape {list(shape)}, expected floating point of shape "
                f"[{hidden_size}]. The adapter's config and its weights don't belong together."
            )
    if len({checkpoint_key(key) for key in described}) < len(described):
        raise VectorError(f"{source}: received two vectors for the same place in {shorten(list(described))}.")
    if not described or (count is not None and len(described) != count):
        raise VectorError(
            f"{source}: received {len(described)} steering vectors, expected {count or 'at least one'}, one for each "
            "steered layer. The file is incomplete: save or download it again."
        )


def check_tensors(tensors: Mapping[str, torch.Tensor], hidden_size: int, count: int | None, source: str) -> None:
    """`check_described` on tensors, and that they are finite in float32, which they are about to become.

    Raises:
        VectorError: as there, or a value is not finite.
    """
    check_described({key: (t.dtype, t.shape) for key, t in tensors.items()}, hidden_size, count, source)
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor.float()).all():
            raise VectorError(
                f"{source}: {shorten(key)} holds NaN or infinity, expected finite values. Save or train it again."
            )


def read_vectors(path: str | Path, hidden_size: int, layers: list[int] | None) -> dict[str, torch.Tensor]:
    """The vectors of a safetensors file, by key; it must hold the layers that the config names.

    The header is checked before any tensor is loaded, then `check_tensors`.

    Raises:
        VectorError: also if the file is cut short or not safetensors at all.
    """
    header = without_embeddings(read_header(path), str(path))
    described = {key: (DTYPES.get(entry.dtype, entry.dtype), entry.shape) for key, entry in header.items()}
    check_described(described, hidden_size, None if layers is None else len(layers), str(path))
    tensors = load_tensors(path, header)
    check_tensors(tensors, hidden_size, None, str(path))
    found = sorted(int(match[1]) for key in header if (match := _LAYER.search(key)))
    if layers is not None and found != sorted(layers):
        raise VectorError(
            f"{path}: received vectors for the layers {found}, expected {sorted(layers)} as in the adapter's config. "
            "The two files don't belong together."
        )
    return tensors


def load_tensors(path: str | Path, keys: Iterable[str]) -> dict[str, torch.Tensor]:
    """Some tensors of a safetensors file whose header has been checked.

    Raises:
        VectorError: the file can't be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in keys}
    except (SafetensorError, OSError) as error:
        raise VectorError(f"{path}: received a file that can't be read as safetensors ({error}).") from error


def check_place(keys: Iterable[str], names: Iterable[str], source: str) -> None:
    """Refuse vectors that have no place in a model, before it is touched.

    Args:
        keys: of the file.
        names: paths of the modules that are about to be steered.
        source: the adapter, for messages.

    Raises:
        VectorError: the two are not the same places.
    """
    received = {checkpoint_key(key) for key in keys}
    expected = {checkpoint_key(f"{PREFIX}{name}.steering.steer_vector") for name in names}
    renamed = match_by_layer(expected - received, received - expected)
    if {renamed.get(key, key) for key in received} != expected:
        raise VectorError(
            f"{source}: received vectors for {shorten(sorted(received))}, expected {shorten(sorted(expected))}. The "
            "adapter was made for a model with other decoder layers."
        )
