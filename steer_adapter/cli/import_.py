"""`steer-adapter import`: a bare `.pt` vector into an adapter."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from steer_adapter.errors import VectorError
from steer_adapter.files.card_file import kept_if_edited
from steer_adapter.interop.pt import layer_of, read_pt
from steer_adapter.tuner import SteerConfig, SteerLayer
from steer_adapter.tuner.facts import renew_cards

from .models import check_folder
from .output import check_output, written_whole


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="steer-adapter import",
        description="Make an adapter of a bare .pt vector. The file is read without running anything in it.",
    )
    result.add_argument("file", metavar="FILE.pt", help="one float tensor of the model's hidden size")
    result.add_argument("--model", required=True, help="folder or Hub id of the model it was made for")
    result.add_argument("--layer", type=int, help="decoder layer, from 0; by default the one in the file's name")
    result.add_argument("--output", help="folder for the adapter; by default the file's name without .pt")
    result.add_argument("--multiplier", type=float, default=1.0, help="initial strength, default 1")
    result.add_argument("--overwrite", action="store_true", help="write into a folder that holds something already")
    return result


def run(argv: Sequence[str]) -> None:
    """The command."""
    arguments = parser().parse_args(argv)
    file = Path(arguments.file).expanduser()
    vector = read_pt(file)
    layer = layer_of(file, arguments.layer)
    output = check_output(arguments.output or file.with_suffix(""), arguments.overwrite)
    model = with_vector(arguments.model, vector, layer, arguments.multiplier, file)
    with kept_if_edited(output):
        with written_whole(output) as beside:
            model.save_pretrained(str(beside))
        renew_cards(output)
    print(f"The adapter is in {output}. Look at it: steer-adapter inspect {output}")


def with_vector(name: str, vector: torch.Tensor, layer: int, multiplier: float, file: Path) -> Any:
    """A model without weights that carries the vector.

    Raises:
        VectorError: the vector is not of the model's hidden size.
    """
    check_folder(name)
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(name))
    base.name_or_path = name
    source = {"source": file.name, "file_sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    config = SteerConfig(
        layers_to_transform=layer,
        multiplier=multiplier,
        task_type="CAUSAL_LM",
        provenance={"method": "imported", "imported_from": source},
    )
    model = get_peft_model(base, config)
    (steering,) = [module for module in model.modules() if isinstance(module, SteerLayer)]
    if vector.numel() != steering.hidden_size:
        raise VectorError(
            f"{file}: received a vector of size {vector.numel()}, but the hidden size of {name} is "
            f"{steering.hidden_size}. Pass the model that it was made for."
        )
    with torch.no_grad():
        steering.steer_vector["default"].copy_(vector)
    return model
