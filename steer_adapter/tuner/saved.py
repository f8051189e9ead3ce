"""The saved form of a vector: what its file may hold, and where its keys belong in a model."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from safetensors import SafetensorError, safe_open

from steer_adapter.errors import VectorError


PREFIX = "base_model.model."
# Wrappers that put themselves into the keys of a state dict; the path in the unwrapped model has none of them.
WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
_KEY = re.compile(r"^base_model\.model\.(?P<path>.+)\.steering\.steer_vector$")
_LAYER = re.compile(r"\.(\d+)\.steering\.steer_vector$")


def checkpoint_key(key: str) -> str:
    """The key as it is saved: `base_model.model.` at most once, however many tuners and wrappers there are."""
    for wrapper in WRAPPERS:
        key = key.replace(wrapper, "")
    while key.startswith(PREFIX * 2):
        key = key.removeprefix(PREFIX)
    return key


def match_by_layer(missing: Iterable[str], unused: Iterable[str]) -> dict[str, str]:
    """Pair checkpoint keys that a model lacks with those that a file has, by layer index: `{file key: model key}`.

    For a vector whose model names its decoder layers differently, e.g. a text model inside a multimodal one.
    """
    by_layer = {match[1]: key for key in missing if (match := _LAYER.search(key))}
    return {
        key: by_layer[match[1]] for key in unused if (match := _LAYER.search(key)) is not None and match[1] in by_layer
    }


def without_embeddings(tensors: Mapping[str, torch.Tensor], source: str) -> dict[str, torch.Tensor]:
    """The tensors but for embedding layers, which PEFT adds to any adapter once a vocabulary has been resized.

    A vector has no use for them, and they would overwrite those of the model: they are left out, with a warning.
    """
    extra = [key for key in tensors if key.rpartition(".")[0].rpartition(".")[2] in EMBEDDING_LAYER_NAMES]
    if extra:
        warnings.warn(
            f"{source}: the embedding layers {extra} came along with the steering vector and are left out.",
            stacklevel=2,
        )
    return {key: tensor for key, tensor in tensors.items() if key not in extra}


def layer_of(key: str) -> int:
    """The index of the decoder layer in a key, -1 without one."""
    match = _LAYER.search(key)
    return int(match[1]) if match else -1


def check_tensors(tensors: Mapping[str, torch.Tensor], hidden_size: int, count: int | None, source: str) -> None:
    """Refuse tensors that are not steering vectors of one model.

    Args:
        tensors: the contents of a file, by key.
        hidden_size: H; each tensor must be `[H]`, floating point and finite.
        count: how many vectors are expected, if known.
        source: where they come from, for messages.

    Raises:
        VectorError: a foreign key, another shape or dtype, a value that is not finite, vectors missing.
    """
    for key, tensor in tensors.items():
        if not _KEY.match(key):
            raise VectorError(
                f"{source}: received the key {key!r}, expected only keys like "
                "'base_model.model.<decoder layer>.steering.steer_vector'. The file is not a steering vector."
            )
        if list(tensor.shape) != [hidden_size] or not tensor.is_floating_point():
            raise VectorError(
                f"{source}: {key!r} is {tensor.dtype} of shape {list(tensor.shape)}, expected floating point of shape "
                f"[{hidden_size}]. The adapter's config and its weights don't belong together."
            )
        if not torch.isfinite(tensor).all():
            raise VectorError(
                f"{source}: {key!r} holds NaN or infinity, expected finite values. Save or train it again."
            )
    if not tensors or (count is not None and len(tensors) != count):
        raise VectorError(
            f"{source}: received {len(tensors)} steering vectors, expected {count or 'at least one'}, one for each "
            "steered layer. The file is incomplete: save or download it again."
        )


def read_vectors(path: str | Path, hidden_size: int, layers: list[int] | None) -> dict[str, torch.Tensor]:
    """The vectors of a safetensors file, by key, after `check_tensors`; it must hold the layers that the config names.

    Raises:
        VectorError: also if the file is cut short or not safetensors at all.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, not a dict
    except (SafetensorError, OSError) as error:
        raise VectorError(
            f"{path}: received a file that can't be read as safetensors ({error}), expected whole steering vectors. "
            "It may be cut short: save or download it again."
        ) from error
    tensors = without_embeddings(tensors, str(path))
    check_tensors(tensors, hidden_size, None if layers is None else len(layers), str(path))
    found = sorted(int(match[1]) for key in tensors if (match := _LAYER.search(key)))
    if layers is not None and found != sorted(layers):
        raise VectorError(
            f"{path}: received vectors for the layers {found}, expected {sorted(layers)} as in the adapter's config. "
            "The two files don't belong together."
        )
    return tensors
