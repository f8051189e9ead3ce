from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import yaml

from steer_adapter.cli.run_file import run_options, write_run_file
from steer_adapter.learn.bipo import BiPOConfig


@dataclass
class Arguments:
    model: str
    data: str
    output: str
    layers: list[int] = field(default_factory=list)
    eval_data: str | None = None
    chat: str = "auto"
    overwrite: bool = False


@pytest.fixture
def options(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.jsonl").write_text("{}")
    arguments = Arguments("org/model", "pairs.jsonl", "out", [15], chat="off", overwrite=True)
    kwargs = dict(learning_rate=1e-5, beta=0.1 + 0.2, lr_scheduler_type="linear", hub_token="secret", report_to="none")
    config = BiPOConfig(output_dir="x", use_cpu=True, logging_steps=7, **kwargs)
    return run_options(arguments, config, BiPOConfig(output_dir="x"))


def test_what_differs_from_the_defaults_is_written(options, tmp_path):
    assert options == dict(
        model="org/model",
        data=str(tmp_path / "pairs.jsonl"),
        output=str(tmp_path / "out"),
        layers=[15],
        chat="off",
        learning_rate=1e-5,
        beta=0.1 + 0.2,
        lr_scheduler_type="linear",
        use_cpu=True,
    )


def test_numbers_survive_the_file(options, tmp_path):
    write_run_file(tmp_path, options)
    text = (tmp_path / "run.yaml").read_text()
    assert yaml.safe_load(text) == options and "secret" not in text
