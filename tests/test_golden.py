"""Adapters of this format, made once: they load for ever, with the same logits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from golden.make import PROMPT_LENGTH, fixed_model
from golden.make import logits as logits_of
from peft import PeftModel
from torch import nn

from steer_adapter import steering
from steer_adapter.sharing.inspection import inspect_adapters
from steer_adapter.sharing.loading import load_adapters


GOLDEN = Path(__file__).parent / "golden"
ARCHITECTURES = {"gpt2": "gpt2", "encoder": "t5"}
ALL_TOKENS = ["llama", "gpt2", "targets", "bfloat16", "library/calm", "library/blunt", "encoder"]
# Which of the six tokens a scope steers: the last of the four of the prompt predicts the first of the completion.
SCOPES = {"prompt": [1, 1, 1, 0, 0, 0], "completion": [0, 0, 0, 1, 1, 1]}
ADAPTERS = [*ALL_TOKENS, *SCOPES]


def base(name: str) -> nn.Module:
    return fixed_model(ARCHITECTURES.get(name, "llama"))


def expected(name: str) -> torch.Tensor:
    return torch.tensor(json.loads((GOLDEN / name / "logits.json").read_text()))


def logits(model: Any) -> torch.Tensor:
    with steering(model, prompt_lengths=[PROMPT_LENGTH]):
        return logits_of(model)


@pytest.mark.parametrize("name", ADAPTERS)
def test_they_load_by_peft(name):
    model = base(name)
    plain = logits_of(model)
    steered = logits(PeftModel.from_pretrained(model, GOLDEN / name))
    assert (steered - expected(name)).abs().max() <= 1e-5
    assert (steered - plain).abs().max() > 0.01


@pytest.mark.parametrize("name", ADAPTERS)
def test_they_load_by_transformers(name):
    model = base(name)
    model.load_adapter(str(GOLDEN / name))
    assert (logits(model) - expected(name)).abs().max() <= 1e-5


def test_the_library_loads():
    model = load_adapters(fixed_model("llama"), str(GOLDEN / "library"))
    for name in ("calm", "blunt"):
        model.set_adapter(name)
        assert (logits(model) - expected(f"library/{name}")).abs().max() <= 1e-5


def read_by_the_page(folder: Path) -> tuple[float, dict[str, list[float]]]:
    """By the reader that docs/format.md ends with, which knows neither safetensors nor PEFT."""
    page = (Path(__file__).parent.parent / "docs" / "format.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    exec(page.rpartition("```python\n")[2].partition("```")[0], names)
    return names["read_vectors"](folder)


def steered_by_hand(model: nn.Module, deltas: dict[str, torch.Tensor]) -> None:
    """Add `[H]` or `[T, H]` to what modules return."""
    for path, delta in deltas.items():

        def add(module: nn.Module, args: Any, output: Any, delta: torch.Tensor = delta) -> Any:
            return (output[0] + delta, *output[1:]) if isinstance(output, tuple) else output + delta

        model.get_submodule(path).register_forward_hook(add)


@pytest.mark.parametrize("name", ALL_TOKENS)
def test_a_reader_written_from_the_page(name):
    multiplier, vectors = read_by_the_page(GOLDEN / name)
    model = base(name)
    steered_by_hand(model, {module: multiplier * torch.tensor(vector) for module, vector in vectors.items()})
    assert (logits_of(model) - expected(name)).abs().max() <= 1e-5


@pytest.mark.parametrize("name", SCOPES)
def test_a_vector_for_some_of_the_tokens(name, tmp_path):
    with pytest.raises(ValueError, match="knows no positions"):
        read_by_the_page(GOLDEN / name)
    shutil.copytree(GOLDEN / name, tmp_path / name)
    config = tmp_path / name / "adapter_config.json"
    config.write_text(config.read_text().replace(f'"token_scope": "{name}"', '"token_scope": "all"'))
    multiplier, vectors = read_by_the_page(tmp_path / name)
    mask = torch.tensor(SCOPES[name], dtype=torch.float32)[:, None]
    model = base(name)
    steered_by_hand(model, {module: multiplier * mask * torch.tensor(vector) for module, vector in vectors.items()})
    assert (logits_of(model) - expected(name)).abs().max() <= 1e-5


def test_they_can_be_looked_at():
    (report,) = inspect_adapters(str(GOLDEN / "llama"))
    assert [(layer["layer"], round(layer["dose"], 4)) for layer in report["layers"]] == [
        ("1", round(0.5 * report["layers"][0]["norm"] / 2.5, 4)),
        ("3", round(0.5 * report["layers"][1]["norm"] / 4.0, 4)),
    ]
    assert report["recommended_multipliers"] == (-1.0, 1.0)
    assert [adapter["name"] for adapter in inspect_adapters(str(GOLDEN / "library"))] == ["blunt", "calm"]
