"""Many vectors from one folder or repository: as PEFT adapters on a model together, or as a library of thousands."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import nn
from tqdm.auto import tqdm

from steer_adapter.errors import AdapterNameError, SteerError, VectorError
from steer_adapter.tuner import SteerConfig, SteerModel
from steer_adapter.tuner.library import Library
from steer_adapter.tuner.request import BASE
from steer_adapter.tuner.saved import check_tensors, layer_of, load_tensors
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


def load_library(
    dir_or_repo: str | os.PathLike[str], revision: str | None = None, token: str | bool | None = None
) -> Library:
    """Load every vector below a folder, or in a repository of the Hub, into one [`Library`].

    Args:
        dir_or_repo: a folder with saved adapters, one per subfolder at any depth, or the id of such a repository. An
            adapter is named by its path inside, e.g. `"cheerful"` or `"customers/1234"`.
        revision: of the repository.
        token: for a private repository.

    Raises:
        SteerError: there is no adapter, or one of them is damaged, of another kind, or for a model of another shape.
    """
    root = fetch(str(dir_or_repo), revision, token, files=(CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME))
    configs, vectors = {}, {}
    for folder in tqdm(sorted(_folders(root)), desc="Loading vectors", unit="", leave=False):
        name = folder.relative_to(root).as_posix()
        if name in (".", BASE):
            raise AdapterNameError(
                f"{folder}: received an adapter named {name!r}, expected each in a folder of its own."
            )
        configs[name], vectors[name] = _read(folder)
    if not configs:
        raise VectorError(f"{dir_or_repo}: received no {CONFIG_NAME} in any subfolder, expected saved vectors.")
    return Library(configs, vectors)


def _folders(root: Path) -> Iterator[Path]:
    for folder, _, files in os.walk(root):
        if CONFIG_NAME in files:
            yield Path(folder)


def _read(folder: Path) -> tuple[SteerConfig, dict[int, torch.Tensor]]:
    config = load_config(folder)
    if (
        config.operation != "add"
        or config.target_modules is not None
        or not isinstance(config.layers_to_transform, list)
    ):
        raise SteerError(f"{folder}: a library takes vectors with operation 'add' and layers_to_transform only.")
    tensors = load_tensors(folder / SAFETENSORS_WEIGHTS_NAME, config.saved_keys or ())
    check_tensors(tensors, config.hidden_size or 0, len(config.layers_to_transform), str(folder))
    return config, {layer_of(key): tensor for key, tensor in tensors.items()}
