"""Preference pairs in TRL's own formats: where they come from, and what must hold before anything trains on them.

A pair is `{"prompt", "chosen", "rejected"}`: strings (plain text), or lists of `{"role", "content"}` messages
(conversational). See https://huggingface.co/docs/trl/dataset_formats#preference.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steer_adapter.errors import DataError
from steer_adapter.extras import require


if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)
COLUMNS = ("prompt", "chosen", "rejected")
READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def load_pairs(
    source: str, columns: Mapping[str, str] | None = None, split: str = "train", drop_bad: bool = False
) -> Dataset:
    """Load preference pairs from a file or from the Hub, and check them.

    Args:
        source: a `.jsonl`, `.json`, `.csv` or `.parquet` file, or the id of a dataset on the Hub.
        columns: names of the source's columns for `prompt`, `chosen` and `rejected`, where they differ.
        split: which split of a dataset on the Hub.
        drop_bad: leave bad pairs out, with a warning that counts them, instead of refusing the data.

    Returns:
        A dataset with the columns `prompt`, `chosen`, `rejected`, and no others.

    Raises:
        DataError: no such file, a missing column, no rows, an empty text, or chosen equal to rejected.
    """
    require("datasets", "train", "Loading preference pairs")
    dataset = _read(source, split)
    names = {column: (columns or {}).get(column, column) for column in COLUMNS}
    missing = sorted(set(names.values()) - set(dataset.column_names))
    if missing:
        raise DataError(
            f"{source}: received the columns {dataset.column_names}, expected {list(names.values())} ({missing} "
            "missing). Rename them with --prompt-column, --chosen-column and --rejected-column."
        )
    dataset = dataset.select_columns(list(names.values())).rename_columns({v: k for k, v in names.items() if k != v})
    if drop_bad:
        count = len(dataset)
        dataset = dataset.filter(lambda row: _problem(row) is None, desc="Looking for bad pairs")
        if len(dataset) < count:
            logger.warning(
                "%s: %d of %d pairs can't be trained on and are left out.", source, count - len(dataset), count
            )
    check_pairs(dataset, source)
    return dataset


def _read(source: str, split: str) -> Dataset:
    from datasets import load_dataset

    path = Path(source)
    looks_like_file = path.suffix in READERS or path.exists() or source.startswith((".", "/", "~"))
    if looks_like_file and not path.is_file():
        raise DataError(f"{source}: received a path where there is no file, expected one of {sorted(READERS)}.")
    if looks_like_file and path.suffix not in READERS:
        raise DataError(f"{source}: received a {path.suffix!r} file, expected one of {sorted(READERS)}.")
    if looks_like_file and os.path.getsize(path) == 0:
        raise DataError(f"{source}: received an empty file, expected preference pairs.")
    try:
        if looks_like_file:
            return load_dataset(READERS[path.suffix], data_files=str(path), split="train")
        return load_dataset(source, split=split)
    except Exception as error:  # `datasets` raises many kinds, most of them without the name of the file
        raise DataError(
            f"{source}: it can't be read as preference pairs ({type(error).__name__}: {error})."
        ) from error


def check_pairs(rows: Iterable[Mapping[str, Any]], source: str = "The data") -> None:
    """Check every pair.

    Raises:
        DataError: with the number of the first bad row, counted from 1.
    """
    number = 0
    for number, row in enumerate(rows, start=1):
        problem = _problem(row)
        if problem is not None:
            raise DataError(
                f"{source}, row {number}: {problem}. Mend or remove it (--drop-bad-pairs leaves such rows out)."
            )
    if number == 0:
        raise DataError(f"{source}: received no rows, expected at least one preference pair.")


def _problem(row: Mapping[str, Any]) -> str | None:
    for column in ("chosen", "rejected"):
        if column not in row:
            return f"received {sorted(row)}, expected a column {column!r}"
    for column in COLUMNS:
        if column in row and not _has_text(row[column]):
            return f"`{column}` is {row[column]!r}, expected text in it"
    if row["chosen"] == row["rejected"]:
        return f"`chosen` equals `rejected` ({row['chosen']!r}), so the pair says nothing"
    return None


def _has_text(value: Any) -> bool:
    if isinstance(value, str):
        return bool(value.strip())
    return isinstance(value, list) and bool(value) and all(_has_text(message.get("content")) for message in value)


def token_counts(dataset: Dataset) -> Iterator[tuple[int, int, int]]:
    """How many tokens the prompt, the chosen and the rejected answer of each pair have, once DPOTrainer made them."""
    import pyarrow.compute

    columns = [f"{column}_ids" for column in COLUMNS]
    for table in dataset.select_columns(columns).with_format("arrow").iter(1000):
        yield from zip(*(pyarrow.compute.list_value_length(table[c]).to_pylist() for c in columns), strict=True)


def check_tokens(dataset: Dataset, source: str) -> None:
    """Check what a tokenizer made of the pairs.

    Raises:
        DataError: an answer has no token, or both answers have the same tokens in every pair.
    """
    remedy = (
        "Is it the model's tokenizer, with all its files? For a folder without them transformers makes one that knows "
        "no word."
    )
    for number, (_, *counts) in enumerate(token_counts(dataset), start=1):
        if 0 in counts:
            raise DataError(f"{source}, row {number}: the tokenizer makes no token of an answer. {remedy}")
    if all(row["chosen_ids"] == row["rejected_ids"] for row in dataset):
        raise DataError(f"{source}: the tokenizer makes the same tokens of chosen and rejected in every row. {remedy}")


def is_conversational(row: Mapping[str, Any]) -> bool:
    """Whether a pair is made of messages."""
    return isinstance(row["chosen"], list)


def as_conversations(dataset: Dataset, system_prompt: str | None = None) -> Dataset:
    """Plain-text pairs as conversations of one turn, so that the model's chat template applies.

    Args:
        dataset: pairs; those that are conversations already only get the system prompt.
        system_prompt: put first, where given.
    """
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        if is_conversational(row):
            return {**row, "prompt": system + row["prompt"]}
        return {
            "prompt": [*system, {"role": "user", "content": row["prompt"]}],
            "chosen": [{"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}],
        }

    # Columns change their type from text to messages, which `map` only allows when the old ones are removed.
    return dataset.map(convert, remove_columns=dataset.column_names, desc="Formatting as conversations")
