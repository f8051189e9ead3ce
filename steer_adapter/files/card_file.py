"""The card's file: written and renewed, but left alone once somebody has edited it."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.utils import yaml_dump

from .card import LIBRARY_TITLE


logger = logging.getLogger(__name__)
NAME = "README.md"
UNREADABLE = "can't be read as a model card (UTF-8, with a YAML block of names and values if any)"
_MARKER = re.compile(r"<!-- steer-adapter card ([0-9a-f]{64}) -->")
_FRAMEWORK = re.compile(r"### Framework versions|- PEFT \S+")
# PEFT writes these into every card; for a local model they hold a path, which the Hub refuses.
_PEFT_TAG = "base_model:adapter:"


def is_readable(path: Path) -> bool:
    """Whether a file is a card: UTF-8, with a YAML block of the Hub's kind, if any."""
    try:
        return _parse(path.read_bytes().decode("utf-8")) is not None
    except UnicodeDecodeError:
        return False


def _parse(text: str) -> ModelCard | None:
    try:
        card = ModelCard(text, ignore_metadata_errors=True)
        yaml_dump(card.data.to_dict())
    except Exception:  # YAML and huggingface_hub raise many kinds
        return None
    return card


def is_edited(text: str) -> bool:
    """Whether the text of a card is anything but what this package, PEFT or transformers wrote there."""
    parsed = _parse(text)
    if parsed is None:
        return True
    card = parsed.text
    marker = _MARKER.search(card)
    return _digest(card) not in ([marker[1]] if marker else _stubs())


@functools.cache
def _stubs() -> tuple[str, ...]:
    """Of PEFT, and of transformers, whose `push_to_hub` leaves one in a new repository."""
    description = (
        "This is the model card of a 🤗 transformers model that has been pushed on the Hub. This model card has been "
        "automatically generated."
    )
    data = ModelCardData()
    cards = [ModelCard.from_template(data), ModelCard.from_template(data, model_description=description)]
    return tuple(_digest(card.text) for card in cards)


def is_library_card(path: Path) -> bool:
    """Whether a card is that of a folder with adapters in subfolders, or the stub that PEFT leaves there."""
    text = path.read_text(encoding="utf-8", errors="replace")
    return LIBRARY_TITLE in text.splitlines() or (not is_edited(text) and not _MARKER.search(text))


def write_card(path: Path, data: Mapping[str, Any], body: str, versions: Mapping[str, str]) -> bool:
    """Write or renew a card.

    Of a card that somebody edited only the metadata is looked after; of any other the metadata that is not ours is
    kept. One that can't be read is left as it is, with a warning.

    Args:
        path: of the file.
        data: the metadata.
        body: the text.
        versions: of frameworks, for its last section.

    Returns:
        whether the text was written.
    """
    if path.is_file() and not is_readable(path):
        logger.warning("%s %s; it is left as it is.", path, UNREADABLE)
        return False
    previous = _load(path)
    if previous is not None and is_edited(previous.content):
        wanted = {k: v for k, v in previous.data.to_dict().items() if k != "base_model" or "base_model" in data}
        _write(path, _with_tags(wanted, data), previous.text)
        return False
    kept = {} if previous is None else previous.data.to_dict()
    if kept.get("license") in (None, "unknown"):
        kept.pop("license", None)
    merged = {**data, **{key: value for key, value in kept.items() if key not in _OURS}}
    framework = "\n".join(f"- {name} {version}" for name, version in versions.items())
    text = f"{body}\n\n### Framework versions\n\n{framework}\n"
    _write(path, _with_tags(merged, data, kept.get("tags")), f"{text}\n<!-- steer-adapter card {_digest(text)} -->\n")
    return True


_OURS = ("base_model", "base_model_relation", "library_name", "pipeline_tag", "tags")


@contextmanager
def kept_if_edited(folder: str | Path) -> Iterator[bool]:
    """Put an edited card aside while others are at it, who may not be able to read it; whether there is one."""
    path = Path(folder, NAME)
    edited = path.is_file() and is_edited(path.read_text(encoding="utf-8", errors="replace"))
    aside = path.with_name(f".{NAME}-{secrets.token_hex(8)}")
    if edited:
        os.replace(path, aside)
    try:
        yield edited
    finally:
        if edited:
            os.replace(aside, path)


def adopt_metadata(path: Path, text: str) -> None:
    """Take over what the metadata of another version of a card say and this one's don't, such as a license."""
    card = _load(path)
    if card is None:
        path.write_text(text, encoding="utf-8")
        return
    theirs = _parse(text)
    other = {} if theirs is None else theirs.data.to_dict()
    own = {k: v for k, v in card.data.to_dict().items() if (k, v) != ("license", "unknown")}
    if missing := {key: value for key, value in other.items() if key not in own}:
        _write(path, {**card.data.to_dict(), **missing}, card.text)


def _load(path: Path) -> ModelCard | None:
    if not path.is_file():
        return None
    return _parse(path.read_text(encoding="utf-8", errors="replace"))


def _with_tags(data: Mapping[str, Any], ours: Mapping[str, Any], tags: Any = None) -> dict[str, Any]:
    present = tags if isinstance(tags, list) else data.get("tags")
    kept = {tag for tag in present if not str(tag).startswith(_PEFT_TAG)} if isinstance(present, list) else set()
    return {**data, "tags": sorted(kept | set(ours.get("tags", ())), key=str)}


def _write(path: Path, data: Mapping[str, Any], text: str) -> None:
    beside = path.with_name(f".{path.name}-{secrets.token_hex(8)}")
    with open(beside, "x", encoding="utf-8") as file:  # of a mode that follows the umask
        file.write(f"---\n{yaml_dump(dict(data), sort_keys=True)}---\n\n{text.strip()}\n")
    os.replace(beside, path)


def _digest(text: str) -> str:
    """Of the words: PEFT adds its version to every card and changes white space."""
    lines = (" ".join(line.split()) for line in _MARKER.sub("", text).splitlines())
    return hashlib.sha256("\n".join(x for x in lines if x and not _FRAMEWORK.fullmatch(x)).encode()).hexdigest()
