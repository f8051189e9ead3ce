"""`steer-adapter inspect`: what is in a folder or repository of adapters."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from steer_adapter.errors import SteerError
from steer_adapter.files.json_file import shorten
from steer_adapter.sharing.inspection import fit, inspect_adapters


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="steer-adapter inspect", description="Say what is in a steering adapter, or a library of them."
    )
    result.add_argument("source", metavar="DIR_OR_REPO", help="folder or Hub id")
    result.add_argument("--name", action="append", help="only the adapter of this name (its subfolder); repeatable")
    result.add_argument("--revision", help="branch, tag or commit on the Hub")
    result.add_argument("--model", help="also say whether it fits this model, of which only the config is read")
    result.add_argument("--json", action="store_true", help="print JSON")
    return result


def run(argv: Sequence[str]) -> None:
    """The command.

    Raises:
        SteerError: one of the adapters is broken; said after the others are printed.
    """
    arguments = parser().parse_args(argv)
    found = inspect_adapters(arguments.source, arguments.name, arguments.revision)
    if arguments.model is not None:
        for adapter in found:
            if "error" not in adapter:
                adapter["fit"] = fit(adapter, arguments.model)
    if arguments.json:
        print(json.dumps({"source": arguments.source, "adapters": found}, indent=2, allow_nan=False))
    else:
        print("\n\n".join(text(adapter) for adapter in found))
    broken = [f"{adapter['name']}: {adapter['error']}" for adapter in found if "error" in adapter]
    if broken:
        raise SteerError("; ".join(broken))


def text(adapter: dict[str, Any]) -> str:
    """A report for people."""
    lines = [f"{plain(adapter['name'])}"]
    if "error" in adapter:
        return f"{lines[0]}\n  BROKEN: {plain(adapter['error'])}"
    shape = f"{adapter['model_type']}, {adapter['num_hidden_layers']} layers, hidden size {adapter['hidden_size']}"
    revision = f", revision {adapter['revision']}" if adapter["revision"] else ""
    rows = {
        "base model": f"{adapter['base_model']} ({shape}{revision})",
        "operation": f"{adapter['operation']}, tokens: {adapter['token_scope']}, multiplier {adapter['multiplier']:g}",
        "method": adapter["method"],
        "for": adapter["behavior"],
        "data": _data(adapter["data"]),
        "license": adapter["license"],
        "recommended": _range(adapter["recommended_multipliers"]),
        "fit": adapter.get("fit"),
    }
    lines += [f"  {name + ':':<13} {plain(value)}" for name, value in rows.items() if value]
    for layer in adapter["layers"]:
        unknown = "not recorded" if layer["residual_norm"] is None else "not finite"
        dose = unknown if layer["dose"] is None else f"{layer['dose']:.3g}"
        lines.append(f"  layer {layer['layer']}: |v| {layer['norm']:.4g}, dose {dose}")
    for multiplier, measured in sorted((adapter["margins"] or {}).items(), key=lambda item: float(item[0])):
        lines.append(f"  margin at {float(multiplier):+g}: {measured.get('margin', float('nan')):+.3g} nats")
    lines += [f"  card: {plain(warning)}" for warning in adapter["card_warnings"]]
    return "\n".join(lines)


def _data(data: dict[str, Any] | None) -> str:
    if not data:
        return ""
    return f"{data.get('source', 'unnamed')}, {data.get('pairs', '?')} pairs, sha256 {data.get('sha256', '?')}"


def _range(found: tuple[float, float] | None) -> str:
    return "" if found is None else f"multipliers {found[0]:+g} to {found[1]:+g}"


def plain(value: object) -> str:
    """A stranger's text without what a terminal acts on."""
    text = str(value)
    return text if text.isprintable() and len(text) <= 400 else shorten(text, 400)
