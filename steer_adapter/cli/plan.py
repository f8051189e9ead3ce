"""`steer-adapter plan`: the memory and the disk that training needs."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoConfig
from trl import DPOTrainer

from steer_adapter.data import as_conversations, check_tokens, is_conversational, load_pairs
from steer_adapter.errors import ConfigError, ModelError
from steer_adapter.learn.bipo_config import BiPOConfig
from steer_adapter.learn.plan import Need, plan, shape_of
from steer_adapter.learn.shortcut import lengths

from .models import DTYPES, chat_or_plain, check_folder, load_tokenizer
from .vectors import parse_layers


WAYS = {"one": "one process", "parallel": "data parallel", "sharded": "sharded"}


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="steer-adapter plan",
        description="Say what memory and disk `steer-adapter train` needs. Of the model only the config is read.",
    )
    result.add_argument("--model", required=True, help="folder or Hub id of the model, or its config.json")
    result.add_argument("--data", required=True, help="preference pairs, as for train")
    result.add_argument(
        "--layers", nargs="+", help="decoder layers to steer, or each:8-20, as for train; default: the middle one"
    )
    result.add_argument("--tokenizer", help="folder or Hub id of the tokenizer, where it is not the model's")
    result.add_argument("--dtype", choices=DTYPES, default="auto", help="dtype of the model; default: the config's")
    result.add_argument("--processes", type=int, default=8, help="of the runs with several, default 8")
    result.add_argument("--batch", type=int, default=4, help="pairs a step and process, default 4")
    result.add_argument("--max-length", type=int, default=1024, help="tokens of a text, default 1024")
    result.add_argument("--cache-memory", type=float, default=4.0, help="prefix_cache_memory of the run, default 4 GB")
    result.add_argument("--chat", choices=["auto", "on", "off"], default="auto", help="use the chat template")
    result.add_argument("--json", action="store_true", help="print JSON")
    return result


def run(argv: Sequence[str]) -> None:
    """The command."""
    arguments = parser().parse_args(argv)
    for name in ("processes", "batch", "max_length"):
        if getattr(arguments, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')}: received {getattr(arguments, name)}, expected at least 1.")
    if not 0 <= arguments.cache_memory < math.inf:
        raise ConfigError(f"--cache-memory: received {arguments.cache_memory}, expected gigabytes, 0 or more.")
    report = planned(arguments)
    print(json.dumps(report, indent=2) if arguments.json else text(report))


def planned(arguments: argparse.Namespace) -> dict[str, Any]:
    """The plan in plain values; sizes in bytes."""
    config = load_config(arguments.model)
    dtype = _dtype(config, arguments.dtype)
    vectors, _ = parse_layers(arguments.layers or [config.get_text_config().num_hidden_layers // 2])
    shapes = [shape_of(config, layers, dtype) for layers in vectors]
    shape = max(shapes, key=lambda shape: shape.above)
    sizes = sizes_of(arguments)
    memory = int(arguments.cache_memory * 1e9)
    needs = plan(shape, sizes, arguments.batch, arguments.processes, memory, len(vectors))
    return {
        "model": arguments.model, "model_type": config.model_type, "dtype": str(dtype).removeprefix("torch."),
        "layers": vectors, "pairs": len(sizes), "states": sum(sizes), "longest_pair": max(sizes),
        "batch": arguments.batch, "processes": arguments.processes, "shape": asdict(shape),
        "cache": sum(sizes) * shape.state * len(vectors), "needs": {way: asdict(need) for way, need in needs.items()},
    }  # fmt: skip


def load_config(name: str) -> Any:
    """The config of a model.

    Raises:
        ModelError: there is none.
    """
    if not name.endswith(".json"):
        check_folder(name)
    try:
        return AutoConfig.from_pretrained(name)
    except Exception as error:  # each model's config checks itself in its own way
        raise ModelError(f"{name}: received no config of a model ({error}).") from error


def sizes_of(arguments: argparse.Namespace) -> list[int]:
    """States of each pair, tokenized as training does.

    Raises:
        ModelError: there is no tokenizer.
    """
    name = arguments.tokenizer or arguments.model
    try:
        tokenizer = load_tokenizer(name)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{name}: there is no tokenizer to count the tokens of the pairs with. Name one with --tokenizer."
        ) from error
    pairs = load_pairs(arguments.data)
    if is_conversational(pairs[0]) or chat_or_plain(tokenizer, arguments.chat, None):
        pairs = as_conversations(pairs)
    config = BiPOConfig(output_dir="plan", max_length=arguments.max_length, use_cpu=True, report_to="none")
    trainer = SimpleNamespace(_tokenizer=tokenizer, _is_vlm=False)
    tokens = DPOTrainer._prepare_dataset(trainer, pairs, tokenizer, config, "train")
    check_tokens(tokens, arguments.data)
    return list(lengths(tokens, arguments.max_length))


def _dtype(config: Any, name: str) -> torch.dtype:
    found = getattr(config, "dtype", None) if name == "auto" else getattr(torch, name)
    return found if isinstance(found, torch.dtype) else torch.float32


def text(report: dict[str, Any]) -> str:
    """A report for people."""
    shape = report["shape"]
    layers = "; ".join(", ".join(map(str, group)) for group in report["layers"])
    each = f" for each of {len(report['layers'])} vectors" if len(report["layers"]) > 1 else ""
    rows = {
        "model": f"{report['model_type']}, {report['dtype']}, {_size(shape['weights'])} of weights",
        "data": f"{report['pairs']} pairs, {report['states']} states, the longest {report['longest_pair']}",
        "layer": f"{layers} ({_size(shape['above'])} of activations above the first a token)",
        "cache": f"{_size(report['cache'])} ({_size(shape['state'])} a state{each})",
    }
    lines = [f"{name + ':':<7} {value}" for name, value in rows.items()]
    lines += ["", f"{'':<26}{'each device':>14}{'host':>14}{'disk':>14}"]
    for way, name in WAYS.items():
        need = Need(**report["needs"][way])
        label = name if way == "one" else f"{name}, {report['processes']} processes"
        lines.append(f"{label:<26}{_size(need.device):>14}{_size(need.host):>14}{_size(need.disk):>14}")
    return "\n".join(lines)


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.3g} {unit}" if count < 1000 else f"{count:.0f} {unit}"
        count /= 1000
    raise AssertionError
