"""Where recorded states live: in memory up to a limit, then in memory-mapped safetensors files.

An entry belongs to one pair and is found by its tokens, so that data, template and tokenizer need no key of their own:
pairs that changed are other pairs. A folder belongs to one model, layer and dtype (see `fingerprint`). Each entry
carries a checksum, looked at when it is read; what is damaged is dropped and computed again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
import uuid
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from steer_adapter.errors import OutputError


logger = logging.getLogger(__name__)
FORMAT = "2"
SHARD_BYTES = 128 * 2**20
SAMPLE = 4096  # numbers of each parameter that go into the fingerprint


@dataclass(frozen=True)
class Entry:
    """What is kept of one pair.

    Attributes:
        states: `[M, H]`, what enters the steering at the stem and the two branches, in the order of `in_fixed_order`.
        reference: `[2]`, float64: the reference log-probabilities of chosen and rejected.
    """

    states: torch.Tensor
    reference: torch.Tensor


@dataclass(frozen=True, slots=True)  # there is one for each pair
class _Place:
    """Where an entry is in the files."""

    file: Path
    start: int
    stop: int
    reference: tuple[float, float]
    checksum: int


class StateCache:
    """
    Entries by key.

    Args:
        folder: where files are kept, and found again by a later run; None keeps entries in memory as long as there is
            room, and after that in a temporary folder.
        memory: bytes of states to hold in memory, where no folder is given.
        beside: where the temporary folder is made.
        keeps: whether the folder is there for later runs, too.
    """

    def __init__(self, folder: Path | None, memory: int, beside: Path, keeps: bool = True) -> None:
        self.keeps, self.memory, self.beside = folder is not None and keeps, memory, beside
        self.folder = folder
        self._held: dict[bytes, Entry] = {}
        self._held_bytes = 0
        self._places: dict[bytes, _Place] = {}
        self._files: dict[Path, Any] = {}
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self.look_again()

    def __contains__(self, key: bytes) -> bool:
        return key in self._held or key in self._places

    def __len__(self) -> int:
        return len(self._held.keys() | self._places.keys())

    def get(self, key: bytes) -> Entry | None:
        """The entry, or None if there is none, or a damaged one (whose file is forgotten)."""
        if key in self._held:
            return self._held[key]
        place = self._places.get(key)
        if place is None:
            return None
        entry = self._read(place)
        if entry is None:
            logger.warning("%s: it is damaged; its entries are computed again.", place.file)
            self._places = {k: other for k, other in self._places.items() if other.file != place.file}
            del self._files[place.file]
            place.file.unlink(missing_ok=True)
        return entry

    def put(self, key: bytes, entry: Entry) -> None:
        """Keep an entry; written to a file with others once they fill one."""
        if key in self:
            return
        self._held[key] = entry
        self._held_bytes += _size(entry)
        if self._held_bytes > (self.memory if self.folder is None else SHARD_BYTES):
            self.flush()

    def flush(self) -> None:
        """Write what is held in memory.

        Raises:
            OutputError: it can't be written; what was held stays in memory.
        """
        if not self._held:
            return
        if self.folder is None:
            self.folder = Path(tempfile.mkdtemp(prefix="prefix-", dir=self.beside))
        keys: list[bytes] = []
        batch: list[Entry] = []
        size = 0
        for key, entry in list(self._held.items()):
            keys, batch, size = [*keys, key], [*batch, entry], size + _size(entry)
            if size >= SHARD_BYTES or key == next(reversed(self._held)):
                self._index(_write(self.folder, keys, batch))
                keys, batch, size = [], [], 0
        self._held, self._held_bytes = {}, 0

    def look_again(self) -> None:
        """Read the index of files that have appeared in the folder, e.g. by other processes."""
        for file in sorted(self.folder.glob("*.safetensors")) if self.folder else ():
            if file not in self._files:
                self._index(file)

    def check_room(self, size: int, others: int = 0) -> None:
        """See that there is room for `size` bytes more, before anything is computed.

        Args:
            size: bytes that will be put here.
            others: bytes that others will put on the same disk.

        Raises:
            OutputError: there is not, with how much is needed.
        """
        if self.folder is None and self._held_bytes + size <= self.memory:
            return
        where = self.folder or self.beside
        free = shutil.disk_usage(where).free
        if size + others > free:
            raise OutputError(
                f"{where}: the cache of the frozen layers needs {_gigabytes(size + others)}, and the disk has "
                f"{_gigabytes(free)} free. Put it elsewhere with prefix_cache_dir, raise prefix_cache_memory, or "
                "switch it off with prefix_cache=False."
            )

    def close(self) -> None:
        """Write what is to be kept, and remove what is not."""
        if self.keeps:
            self.flush()
        self._files.clear()
        if not self.keeps and self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _index(self, file: Path) -> None:
        try:
            opened = safe_open(file, framework="pt")
            index = {name: opened.get_tensor(name) for name in ("keys", "stops", "reference", "checksums")}
            if opened.metadata() != {"format": FORMAT} or len({len(value) for value in index.values()}) != 1:
                raise ValueError("another format")
            rows = zip(*(index[name].tolist() for name in index), strict=True)
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            logger.warning("%s: it can't be read (%s); its entries are computed again.", file, error)
            file.unlink(missing_ok=True)
            return
        self._files[file] = opened
        start = 0
        for key, stop, reference, checksum in rows:
            self._places[bytes(key)] = _Place(file, start, stop, tuple(reference), checksum)
            start = stop

    def _read(self, place: _Place) -> Entry | None:
        try:
            states = self._files[place.file].get_slice("states")[place.start : place.stop]
        except (SafetensorError, OSError, KeyError):
            return None
        entry = Entry(states, torch.tensor(place.reference, dtype=torch.float64))
        return entry if _checksum(entry) == place.checksum else None


def _write(folder: Path, keys: list[bytes], entries: list[Entry]) -> Path:
    """One file, written beside and renamed."""
    sizes = torch.tensor([len(entry.states) for entry in entries])
    tensors = {
        "keys": torch.tensor([list(key) for key in keys], dtype=torch.uint8),
        "stops": sizes.cumsum(0),
        "reference": torch.stack([entry.reference for entry in entries]),
        "checksums": torch.tensor([_checksum(entry) for entry in entries]),
        "states": torch.cat([entry.states for entry in entries]),
    }
    file = folder / f"{uuid.uuid4().hex}.safetensors"
    beside = file.with_suffix(".incomplete")
    try:
        save_file(tensors, beside, {"format": FORMAT})
        os.replace(beside, file)
    except (OSError, SafetensorError) as error:
        needed = sum(value.nbytes for value in tensors.values())
        raise OutputError(
            f"{folder}: the cache of the frozen layers can't be written ({error}); this file needs "
            f"{_gigabytes(needed)}. Make room, put it elsewhere with prefix_cache_dir, or switch it off with "
            "prefix_cache=False."
        ) from error
    finally:
        beside.unlink(missing_ok=True)
    return file


def _checksum(entry: Entry) -> int:
    states = entry.states.contiguous().view(torch.uint8).numpy()
    return zlib.crc32(entry.reference.numpy(), zlib.crc32(states))


def _size(entry: Entry) -> int:
    return entry.states.nbytes


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.3g} GB"


def pair_key(chosen: list[int], rejected: list[int], starts: tuple[int, int]) -> bytes:
    """The key of a pair: its tokens, and where the completions start."""
    lengths = (len(chosen), len(rejected), *starts)
    return hashlib.blake2b(torch.tensor([*lengths, *chosen, *rejected]).numpy().tobytes(), digest_size=16).digest()


def fingerprint(model: nn.Module, **also: Any) -> str:
    """A name for everything that the states depend on besides the tokens.

    Args:
        model: its config and a sample of every parameter but the vectors being trained.
        also: what else the states depend on, e.g. the layer.
    """
    config = getattr(model, "config", None)
    settings = {key: value for key, value in (config.to_dict() if config else {}).items() if not key.startswith("_")}
    digest = hashlib.blake2b(
        json.dumps([FORMAT, settings, also], sort_keys=True, default=str).encode(), digest_size=12
    )
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            digest.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
            flat = parameter.detach().reshape(-1)
            sample = flat[:: max(1, len(flat) // SAMPLE)].cpu().contiguous()
            digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
