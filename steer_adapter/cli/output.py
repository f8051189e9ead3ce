"""Where a command writes: never over something, and whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from steer_adapter.errors import OutputError


def check_output(folder: str | Path, overwrite: bool) -> Path:
    """The folder to write to.

    Raises:
        OutputError: it is a file, or holds something and `overwrite` is off.
    """
    path = Path(folder).expanduser()
    if path.exists() and not path.is_dir():
        raise OutputError(f"{path}: received a file, expected a folder to write to.")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise OutputError(
            f"{path}: the output folder holds something already, expected an empty or new one. Name another, or pass "
            "--overwrite to replace the files of the same names."
        )
    return path


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A folder beside the files to be; what is in it is moved to `folder` when the block ends without an error.

    The config of an adapter comes last: readers take its presence for that of an adapter.
    """
    folder.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=".incomplete-", dir=folder))
    try:
        yield beside
        files = [path for path in beside.rglob("*") if path.is_file()]
        for path in sorted(files, key=lambda p: p.name == "adapter_config.json"):
            target = folder / path.relative_to(beside)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def remove_if_empty(folder: str | Path) -> None:
    """Remove a folder that nothing was written to, such as one for checkpoints that nobody asked for."""
    with suppress(OSError):
        Path(folder).rmdir()
