"""`run.yaml`: the options of a training run, written beside the adapter that came out of it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from huggingface_hub.utils import yaml_dump


NAME = "run.yaml"
# They decide where things go and what is shown, not what vector comes out; a token is nobody's business.
_LEFT_OUT = ("hub_", "logging_", "save_", "push_to_hub", "report_to", "run_name", "output_dir", "disable_tqdm",
             "resume_from_checkpoint", "recipe", "overwrite")  # fmt: skip
_PATHS = ("model", "data", "eval_data", "output")


def run_options(arguments: Any, config: Any, defaults: Any) -> dict[str, Any]:
    """All options that differ from the defaults, by name.

    Args:
        arguments: of the command.
        config: of the trainer, after training, so that what was found is written too.
        defaults: a fresh one of the same class.
    """
    own = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(arguments)}
    unset = {f.name: f.default for f in dataclasses.fields(arguments) if f.default is not dataclasses.MISSING}
    options = {name: value for name, value in own.items() if name not in unset or value != unset[name]}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.init and value != getattr(defaults, field.name):
            options[field.name] = value.value if isinstance(value, Enum) else value
    return {name: _absolute(name, value) for name, value in options.items() if not name.startswith(_LEFT_OUT)}


def write_run_file(folder: Path, options: Mapping[str, Any]) -> None:
    """Write it."""
    text = yaml_dump(dict(options), sort_keys=False)
    (folder / NAME).write_text(
        "# Makes the same vector again: steer-adapter train --config run.yaml --output FOLDER\n" + text,
        encoding="utf-8",
    )


def _absolute(name: str, value: Any) -> Any:
    """Files by their whole path, so that the folder one is in does not matter."""
    if name not in _PATHS or value is None:
        return value
    if isinstance(value, list):  # one vector is made of one file
        (value,) = value
    path = os.path.expanduser(value)
    return os.path.abspath(path) if name == "output" or os.path.exists(path) else value
