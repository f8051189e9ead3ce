"""The demo's preference pairs: a cheerful answer (chosen) and a gloomy one (rejected) to the same question."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from datasets import Dataset


def load(split: str) -> Dataset:
    """The pairs of a split, `"train"` (230) or `"test"` (40), as plain text."""
    from datasets import Dataset

    lines = files(__package__).joinpath("pairs.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return Dataset.from_list([{k: v for k, v in row.items() if k != "split"} for row in rows if row["split"] == split])
