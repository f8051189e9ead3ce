"""Where adapters are: a folder, or a repository on the Hub that is fetched into the cache."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from steer_adapter.errors import AdapterNameError, ConfigError, VectorError
from steer_adapter.files.json_file import read_json, shorten
from steer_adapter.tuner import SteerConfig
from steer_adapter.tuner.facts import subfolders


# What belongs to an adapter: it is all that is fetched, and all that is pushed.
FILES = (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, "README.md", "run.yaml", "margins.png")


def fetch(
    name: str, revision: str | None = None, token: str | bool | None = None, files: Sequence[str] = FILES
) -> Path:
    """The folder itself, or that of the cache into which the adapters of a repository were fetched.

    Args:
        name: a folder or a Hub id.
        revision, token: for the Hub.
        files: those to fetch, by name, at any depth.

    Raises:
        ConfigError: it is neither a folder nor the name of a repository.
        OSError: the repository can't be reached and is not in the cache (errors of huggingface_hub).
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if os.path.exists(folder) or name.startswith((".", "/", "~")):
        raise ConfigError(f"{name}: received a path where there is no folder, expected an adapter or a Hub id.")
    patterns = [*files, *(f"*/{file}" for file in files)]  # `*` stands for slashes too
    try:
        return Path(snapshot_download(name, revision=revision, token=token, allow_patterns=patterns))
    except HFValidationError as error:
        raise ConfigError(f"{name}: received neither a folder nor a Hub id ({error}).") from error


def load_config(folder: Path) -> SteerConfig:
    """The config of a vector, with its weights checked.

    Raises:
        ConfigError, VectorError: it is no vector, or not whole.
    """
    peft_type = read_json(folder / CONFIG_NAME).get("peft_type")
    if peft_type != "STEER":
        raise ConfigError(f"{folder}: received an adapter of type {shorten(peft_type)}, expected a steering vector.")
    config: SteerConfig = SteerConfig.from_pretrained(str(folder))
    if config.lacks_weights_at is not None:
        raise VectorError(f"{folder}: the adapter has no {SAFETENSORS_WEIGHTS_NAME}; pickled weights are not read.")
    return config


def adapters(folder: Path, source: str, names: list[str] | None = None) -> dict[str, Path]:
    """Folders of the adapters by name: `default` at the top, the others by the subfolder that PEFT saves them to.

    Args:
        folder: where to look.
        source: what the user called it, for messages.
        names: those wanted; all by default.

    Raises:
        AdapterNameError: there is no adapter of a name.
        ConfigError: there are none at all.
    """
    found = {name: folder / name for name in subfolders(folder)}
    if (folder / CONFIG_NAME).is_file():
        found = {"default": folder, **found}
    if not found:
        raise ConfigError(f"{source}: received a folder without {CONFIG_NAME}, expected an adapter or several.")
    if names is None:
        return found
    unknown = [name for name in names if name not in list(found)]
    if unknown or isinstance(names, str):
        raise AdapterNameError(f"{source}: received the names {shorten(names)}, expected some of {sorted(found)}.")
    return {name: found[name] for name in names}
