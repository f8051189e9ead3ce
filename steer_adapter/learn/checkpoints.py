"""Checkpoints that are whole or not there, and how to find the last one that is whole."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from steer_adapter.errors import OutputError


logger = logging.getLogger(__name__)
BESIDE = ".incomplete-checkpoint"
STATE = "trainer_state.json"
NEEDED = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", STATE)
SHARDED_OPTIMIZER = "optimizer.bin"  # what accelerate writes in the place of the optimizer's file under FSDP
DEEPSPEED = "latest"  # what DeepSpeed writes last: the name of the folder with the optimizer's parts


@contextmanager
def written_beside(run_folder: Path, name: str, writes: bool) -> Iterator[Path]:
    """A folder in which the checkpoint `name` is written; renamed into `run_folder` when the block ends well.

    Args:
        run_folder: where checkpoints go.
        name: `checkpoint-N`.
        writes: whether this process is the one that renames.

    Raises:
        OutputError: it can't be written; checkpoints from before are untouched, and the last one is named.
    """
    beside = run_folder / BESIDE
    if writes:
        shutil.rmtree(beside, ignore_errors=True)
    try:
        yield beside
        if writes:
            _finish(beside / name, run_folder / name)
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error) + repr(error.__cause__):
            raise
        last = last_complete(run_folder)
        raise OutputError(
            f"{run_folder / name}: the checkpoint can't be written ({error}); nothing of it is left. Make room, and "
            f"resume from {last or 'the beginning: there is no earlier checkpoint'}."
        ) from error
    finally:
        if writes:
            shutil.rmtree(beside, ignore_errors=True)


def _finish(written: Path, target: Path) -> None:
    for path in written.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    if target.exists():  # of a run before this one
        shutil.rmtree(target)
    os.replace(written, target)


def last_complete(run_folder: Path) -> Path | None:
    """The checkpoint of most steps that can be resumed from; those that are damaged are passed by."""
    numbered = [
        (int(m[1]), p) for p in run_folder.glob("checkpoint-*") if (m := re.fullmatch(r"checkpoint-(\d+)", p.name))
    ]
    for _, folder in sorted(numbered, reverse=True):
        problem = damage(folder)
        if problem is None:
            return folder
        logger.warning("%s is passed by: %s.", folder, problem)
    return None


def damage(folder: Path) -> str | None:
    """What keeps a checkpoint from being resumed from, in a few words; None if nothing does."""
    if (folder / DEEPSPEED).is_file():
        return _deepspeed_damage(folder)
    optimizer = SHARDED_OPTIMIZER if (folder / SHARDED_OPTIMIZER).is_file() else NEEDED[1]
    return _damage(folder, (NEEDED[0], optimizer, *NEEDED[2:]))


def _deepspeed_damage(folder: Path) -> str | None:
    """Its parts are of a format of its own, in which they are read by all processes; here only that they are there."""
    parts = folder / (folder / DEEPSPEED).read_text(encoding="utf-8", errors="replace").strip()
    sizes = [path.stat().st_size for path in parts.glob("*.pt")]
    if parts.parent != folder or not sizes or 0 in sizes:
        return f"it has no {parts.name}, which {DEEPSPEED} names"
    return _damage(folder, (NEEDED[0], STATE))


def _damage(folder: Path, needed: Sequence[str]) -> str | None:
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing:
        return f"it has no {missing[0]}"
    name = NEEDED[0]
    try:
        with safe_open(folder / name, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118  (not a dict)
                file.get_tensor(key)
        for name in needed[1:-1]:
            torch.load(folder / name, map_location="cpu", weights_only=True)
        name = STATE
        json.loads((folder / name).read_text(encoding="utf-8"))["global_step"]
    except Exception as error:  # the readers raise many kinds
        return f"{name} can't be read ({type(error).__name__})"
    return None
