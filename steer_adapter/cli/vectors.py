"""Which vectors one `train` command makes: one on all the layers given, or one on each; and so for each file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from steer_adapter.errors import ConfigError
from steer_adapter.sharing.inspection import inspect_adapters

from .inspect import plain


EACH = "each:"


@dataclass(frozen=True)
class Vector:
    """One of them.

    Attributes:
        name: its folder in the output; "." for one that is alone.
        layers: that it steers.
        data, eval_data: the pairs.
    """

    name: str
    layers: list[int]
    data: str
    eval_data: str | None


def vectors_of(
    data: str | Sequence[str], layers: Sequence[str | int], eval_data: str | Sequence[str] | None
) -> list[Vector]:
    """The vectors that the options ask for, those of the same pairs together.

    Raises:
        ConfigError: layers that can't be read, held-out pairs that don't match the data, or two of one name.
    """
    sources = _listed(data)
    held_out: Sequence[str | None] = _listed(eval_data) or [None] * len(sources)
    if len(held_out) != len(sources):
        raise ConfigError(
            f"--eval-data: received {len(held_out)} files for {len(sources)} in --data, expected one for each, in the "
            "same order, or none."
        )
    groups, each = parse_layers(layers)
    found = []
    for source, own, name in zip(sources, held_out, _names(sources), strict=True):
        for group in groups:
            parts = [name] * (len(sources) > 1) + [f"layer-{group[0]}"] * each
            found.append(Vector("-".join(parts) or ".", group, source, own))
    return found


def parse_layers(values: Sequence[str | int]) -> tuple[list[list[int]], bool]:
    """Layers of each vector, and whether they are one for each: `8 9` is one vector on two layers, `each:8,12-14` is
    four vectors.

    Raises:
        ConfigError: it is neither.
    """
    texts = [str(value) for value in values]
    if not any(text.startswith(EACH) for text in texts):
        if texts and all(re.fullmatch(r"-?\d+", text) for text in texts):
            return [[int(text) for text in texts]], False
    elif len(texts) == 1:
        parts = [re.fullmatch(r"(\d+)(?:-(\d+))?", part) for part in texts[0].removeprefix(EACH).split(",")]
        ranges = [range(int(m[1]), int(m[2] or m[1]) + 1) for m in parts if m and max(len(m[1]), len(m[2] or "")) < 6]
        layers = [layer for layers in ranges for layer in layers]
        if len(ranges) == len(parts) and all(ranges) and len(set(layers)) == len(layers):
            return [[layer] for layer in layers], True
    raise ConfigError(
        f"--layers: received {' '.join(texts)!r}, expected the layers of one vector (8 12), or each:8-20 or "
        "each:8,12,16 for one vector on each of these layers."
    )


def _names(sources: Sequence[str]) -> list[str]:
    """The last part of each source, and as much of the path before it as tells them apart."""
    split = [re.sub(r"\.\w+$", "", source).rstrip("/").split("/") for source in sources]
    for length in range(1, max(map(len, split), default=0) + 1):
        names = [re.sub(r"[^\w-]+", "-", "-".join(parts[-length:])).strip("-") for parts in split]
        if len(set(names)) == len(names) and all(names):
            return names
    raise ConfigError(f"--data: received {', '.join(sources)}, expected files that differ by their names.")


def _listed(value: str | Sequence[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())


def comparison(folder: Path) -> str:
    """A table of the vectors in a folder: norm, dose, and the margins that were measured at −1 and +1."""
    rows: list[tuple[str, ...]] = [("vector", "|v|", "dose", "at -1", "at +1", "right way at +1")]
    for adapter in inspect_adapters(str(folder)):
        margins, layers = adapter.get("margins") or {}, adapter.get("layers") or []
        doses = [layer["dose"] for layer in layers if layer["dose"] is not None]
        down, up = (margins.get(key) or {} for key in ("-1", "1"))
        cells = (
            _number(max((layer["norm"] for layer in layers), default=None), "{:.4g}"),
            _number(max(doses, default=None), "{:.3g}"),
            *(_number(side.get("margin"), "{:+.3g}") for side in (down, up)),
            _number(up.get("right_way"), "{:.0%}"),
        )
        rows.append((plain(adapter["name"]), *cells))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
