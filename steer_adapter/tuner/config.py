"""The configuration of a steering vector, and what must hold before one touches a model."""

from __future__ import annotations

import copy
import functools
import logging
import os
import shutil
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub import constants, file_exists, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from peft.config import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

from steer_adapter.decoder import Decoder
from steer_adapter.errors import ConfigError, ModelError, VectorError
from steer_adapter.files.json_file import shorten
from steer_adapter.files.names import same_model

from .config_file import read_config
from .config_values import FORMAT_VERSION, check_values
from .facts import renew_cards
from .provenance import versions
from .saved import read_vectors


logger = logging.getLogger(__name__)
_FILLED_IN = (
    "layers_to_transform", "target_modules", "hidden_size", "num_hidden_layers", "model_type",
    "base_model_name_or_path", "revision",
)  # fmt: skip


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
        provenance (`dict`, *optional*):
            Where the vector comes from: method, data and their hash, seed, versions, measured margins. See
            `docs/format.md` for its keys. It changes nothing in what the vector does.

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
    provenance: dict[str, Any] | None = field(default=None, metadata={"help": "Where the vector comes from."})

    def __post_init__(self) -> None:
        try:
            super().__post_init__()
        except ValueError as error:
            raise ConfigError(shorten(str(error), 400)) from error
        self.lacks_weights_at: str | None = None
        self.saved_keys: list[str] | None = None
        # What was given and what was filled in for a model, where they may differ.
        self._filled: dict[str, tuple[Any, Any]] = {}
        from peft.utils import PeftType

        self.peft_type = PeftType("STEER")
        if isinstance(self.target_modules, (set, tuple)):
            self.target_modules = sorted(self.target_modules)
        check_values(self)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """Load a config, and check the weights beside it, so that a damaged file is refused before any model changes.

        Raises:
            VectorError: the weights are cut short, not finite, or not steering vectors of the config's shape.
            ConfigError: the file does not say which version of the format it is.
        """
        config = super().from_pretrained(str(pretrained_model_name_or_path), subfolder=subfolder, **kwargs)
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
            vectors = read_vectors(path, config.hidden_size, layers if isinstance(layers, list) else None)
            config.saved_keys = list(vectors)
        return config

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        """The object in a config file.

        Raises:
            ConfigError: see [`~steer_adapter.tuner.config_file.read_config`].
        """
        return read_config(path_json_file)

    @property
    def is_saved(self) -> bool:
        """Whether this config came from a file, so that its vectors are about to be loaded."""
        return self.format_version is not None

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write `adapter_config.json`; and the card, if the weights are there.

        Raises:
            VectorError: the weights were saved with `safe_serialization=False`, as a pickle that nothing reads.
        """
        self.provenance = {"versions": versions(), **(self.provenance or {})}
        check_values(self)
        weights = os.path.join(save_directory, SAFETENSORS_WEIGHTS_NAME)
        if not os.path.exists(weights) and os.path.exists(os.path.join(save_directory, WEIGHTS_NAME)):
            raise VectorError(
                f"{save_directory}: received {WEIGHTS_NAME} without {SAFETENSORS_WEIGHTS_NAME}, expected steering "
                "vectors as safetensors: pickles are refused when loading. Save without safe_serialization=False."
            )
        super().save_pretrained(save_directory, **kwargs)
        if os.path.isfile(weights):
            if not os.path.islink(weights):  # safetensors makes a file that nobody else can read
                shutil.copymode(os.path.join(save_directory, CONFIG_NAME), weights)
            renew_cards(save_directory)

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
            note_transfer(self.base_model_name_or_path, model_name)
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
        path = hf_hub_download(name_or_path, SAFETENSORS_WEIGHTS_NAME, subfolder=subfolder, **hub_kwargs)
        _check_that_peft_finds(path, name_or_path, subfolder, hub_kwargs)
        return path
    except LocalEntryNotFoundError as error:
        raise VectorError(
            f"{name_or_path}: the adapter's {SAFETENSORS_WEIGHTS_NAME} is not in the cache and can't be downloaded "
            f"now ({error}). Try again with a connection."
        ) from error
    except EntryNotFoundError:
        return None


def _check_that_peft_finds(path: str, name: str, subfolder: str | None, hub_kwargs: dict[str, Any]) -> None:
    """PEFT looks for the file once more when the model has been changed already, and in its own ways."""
    if constants.HF_HUB_OFFLINE:
        if subfolder:  # which PEFT names twice then
            raise VectorError(
                f"{name}: received the subfolder {subfolder!r} of a repository while offline, where PEFT can't find "
                f"it. Pass the folder in the cache instead: {os.path.dirname(path)!r}."
            )
        return
    asked = {key: hub_kwargs[key] for key in ("revision", "token") if key in hub_kwargs}
    try:
        found = file_exists(
            name, f"{subfolder}/{SAFETENSORS_WEIGHTS_NAME}" if subfolder else SAFETENSORS_WEIGHTS_NAME, **asked
        )
    except Exception as error:  # of the HTTP library, which differs between versions of huggingface_hub
        raise VectorError(
            f"{name}: the Hub can't be reached ({type(error).__name__}), and PEFT asks it even for files in the "
            "cache. Set HF_HUB_OFFLINE=1 to do without."
        ) from error
    if not found:
        raise VectorError(f"{name}: received no access to the repository, of which the cache has a copy.")


@functools.lru_cache(maxsize=256)
def note_transfer(made_for: str | None, model_name: str | None) -> None:
    """Say once that a vector is put on another checkpoint than the one it was made for."""
    if not same_model(made_for, model_name):
        logger.warning(
            "The steering vector was made for %s and is loaded on %s, another model of the same shape. Whether it "
            "transfers has to be measured.",
            made_for,
            model_name,
        )


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
