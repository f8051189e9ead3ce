"""Bare `.pt` vectors, as the authors of BiPO publish them: one float tensor `[H]`, the layer in the file's name."""

from __future__ import annotations

import os
import re
import warnings
import zipfile
from pathlib import Path

import torch

from steer_adapter.errors import ConfigError, VectorError
from steer_adapter.files.json_file import shorten


_LAYER = re.compile(r"layer[_-]?([0-9]{1,4})", re.IGNORECASE)
MAX_BYTES = 1 << 24


def read_pt(path: str | Path) -> torch.Tensor:
    """The vector in a `.pt` file, float32 `[H]`, read without running anything that the file says.

    Raises:
        VectorError: it is too large, can't be read that way, or is anything but one finite vector.
    """
    if not os.path.isfile(path):
        raise VectorError(f"{path}: received a path where there is no file, expected a .pt file.")
    if os.path.getsize(path) > MAX_BYTES:
        raise VectorError(f"{path}: received {os.path.getsize(path)} bytes, expected one vector.")
    _check_archive(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds on a broken or hostile file
        raise VectorError(
            f"{path}: received a file that holds more than tensors, or is damaged ({type(error).__name__}), expected "
            "a tensor saved by torch.save."
        ) from error
    if not isinstance(value, torch.Tensor) or value.ndim != 1 or not value.is_floating_point() or not value.numel():
        described = f"shape {list(value.shape)}" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
        raise VectorError(f"{path}: received {described}, expected one floating point tensor of shape [hidden_size].")
    if value.is_meta or value.layout is not torch.strided or value.is_quantized or value.numel() > MAX_BYTES // 4:
        raise VectorError(
            f"{path}: received a {value.layout} tensor of {value.numel()} numbers on {value.device}, expected a plain "
            "one of a model's hidden size, with its values."
        )
    vector = value.detach().float().clone()
    if not torch.isfinite(vector).all():
        raise VectorError(f"{path}: received a vector with NaN or infinity, expected finite values.")
    return vector


def _check_archive(path: str | Path) -> None:
    """Refuse an archive that unpacks to more than it is: torch stores tensors as they are."""
    try:
        with zipfile.ZipFile(path) as archive:
            packed = [entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return  # of an older kind, or damaged, which torch says
    if packed:
        raise VectorError(f"{path}: received an archive with compressed entries ({shorten(packed)}), expected none.")


def layer_of(path: str | Path, given: int | None) -> int:
    """The layer: the one given, or that of the file's name, e.g. 15 of `vec_ep20_layer15.pt`.

    Raises:
        ConfigError: neither says one, or they contradict each other.
    """
    match = _LAYER.search(Path(path).name)
    if given is None and match is None:
        raise ConfigError(f"{path}: the file's name does not say the layer. Pass one with --layer.")
    if given is not None and match is not None and given >= 0 and given != int(match[1]):
        raise ConfigError(
            f"{path}: received layer {given}, but the file's name says {int(match[1])}. Rename the file."
        )
    return given if given is not None else int(match[1])  # type: ignore[index]
