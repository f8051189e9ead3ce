"""What is known of a saved adapter, for its card and for whoever looks at it; and the card's renewal on saving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import transformers
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from steer_adapter.errors import ConfigError
from steer_adapter.files.card import Facts, Vector, body, library_body, metadata
from steer_adapter.files.card_file import NAME, is_library_card, write_card
from steer_adapter.files.header import read_header
from steer_adapter.files.json_file import read_json
from steer_adapter.version import __version__

from .saved import load_tensors, place_of, without_embeddings


_NO_PARTS = (".", "_", "checkpoint-")


def facts_of(folder: str | Path, name: str, subfolder: str | None = None) -> Facts:
    """What the files of an adapter say; they are taken as checked.

    Args:
        folder: where they are.
        name: folder or Hub id to load the adapter from.
        subfolder: of that.
    """
    folder = Path(folder)
    config = read_json(folder / CONFIG_NAME)
    path = folder / SAFETENSORS_WEIGHTS_NAME
    tensors = load_tensors(path, without_embeddings(read_header(path), str(path)))
    norms = {place_of(key): float(tensor.double().norm()) for key, tensor in tensors.items()}
    residual = (config.get("provenance") or {}).get("residual_norms") or {}
    places = sorted(norms, key=lambda place: (not place.isdecimal(), int(place) if place.isdecimal() else 0, place))
    vectors = tuple(Vector(place, norms[place], residual.get(place)) for place in places)
    files = frozenset(entry.name for entry in folder.iterdir())
    return Facts(config, vectors, name, subfolder, files, () if subfolder else tuple(subfolders(folder)))


def subfolders(folder: str | Path) -> list[str]:
    """Names of the subfolders that hold a steering adapter, maybe a broken one, and none of another method."""
    found = [path for path in sorted(Path(folder).glob(f"*/{CONFIG_NAME}")) if not _is_of_another_method(path)]
    return [path.parent.name for path in found if not path.parent.name.startswith(_NO_PARTS)]


def _is_of_another_method(path: Path) -> bool:
    try:
        peft_type = read_json(path).get("peft_type")
    except ConfigError:
        return False  # it can't be told, and whoever asks for what is there has to hear of it
    return isinstance(peft_type, str) and peft_type != "STEER"


def _is_part_of_library(folder: Path) -> bool:
    """Whether PEFT has just saved an adapter in a subfolder of its name, or there is one beside."""
    card = folder.parent / NAME
    if folder.name.startswith(_NO_PARTS):
        return False
    return (folder.parent / CONFIG_NAME).is_file() or (card.is_file() and is_library_card(card))


def renew_cards(folder: str | Path) -> None:
    """Write the card of an adapter and, if it is one of a library, that of the library. Edited ones are left alone.

    Args:
        folder: the adapter's.
    """
    folder = Path(folder)
    if _is_part_of_library(folder):
        _renew_top(folder.parent, str(folder.parent))
        _renew(facts_of(folder, str(folder.parent), folder.name), folder)
    else:
        _renew(facts_of(folder, str(folder)), folder)


def renew_all_cards(folder: Path, name: str) -> None:
    """Write the cards of an adapter or a library, and of all in it, with another name to load them by."""
    _renew_top(folder, name)
    for subfolder in subfolders(folder):
        _renew(facts_of(folder / subfolder, name, subfolder), folder / subfolder)


def _renew_top(folder: Path, name: str) -> None:
    if (folder / CONFIG_NAME).is_file():
        _renew(facts_of(folder, name), folder)
        return
    data: dict[str, Any] = {"library_name": "peft", "tags": ["steer-adapter", "steering-vector"], "license": "unknown"}
    write_card(folder / NAME, data, library_body(name, subfolders(folder)), _versions())


def _renew(facts: Facts, folder: Path) -> None:
    write_card(folder / NAME, metadata(facts), body(facts), _versions())


def _versions() -> dict[str, str]:
    # PEFT looks for its own line and adds one otherwise.
    return {"PEFT": peft.__version__, "transformers": transformers.__version__, "steer-adapter": __version__}
