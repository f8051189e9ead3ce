"""Adapters of this format, made once: they load for ever, with the same logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import steered_by_hand
from golden.make import INPUT, fixed_model
from peft import PeftModel

from steer_adapter.sharing.inspection import inspect_adapters
from steer_adapter.sharing.loading import load_adapters


GOLDEN = Path(__file__).parent / "golden"
ADAPTERS = ["llama", "gpt2", "targets", "bfloat16", "library/calm", "library/blunt"]


def architecture(name: str) -> str:
    return "gpt2" if name == "gpt2" else "llama"


def expected(name: str) -> torch.Tensor:
    return torch.tensor(json.loads((GOLDEN / name / "logits.json").read_text()))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(INPUT).logits[0, -1]


@pytest.mark.parametrize("name", ADAPTERS)
def test_they_load_by_peft(name):
    model = fixed_model(architecture(name))
    plain = logits(model)
    steered = logits(PeftModel.from_pretrained(model, GOLDEN / name))
    assert (steered - expected(name)).abs().max() <= 1e-5
    assert (steered - plain).abs().max() > 0.01


@pytest.mark.parametrize("name", ADAPTERS)
def test_they_load_by_transformers(name):
    model = fixed_model(architecture(name))
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


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_reader_written_from_the_page(name):
    multiplier, vectors = read_by_the_page(GOLDEN / name)
    deltas = {int(module.rpartition(".")[2]): multiplier * torch.tensor(vector) for module, vector in vectors.items()}
    model = fixed_model(architecture(name))
    with steered_by_hand(model, deltas):
        assert (logits(model) - expected(name)).abs().max() <= 1e-5


def test_they_can_be_looked_at():
    (report,) = inspect_adapters(str(GOLDEN / "llama"))
    assert [(layer["layer"], round(layer["dose"], 4)) for layer in report["layers"]] == [
        ("1", round(0.5 * report["layers"][0]["norm"] / 2.5, 4)),
        ("3", round(0.5 * report["layers"][1]["norm"] / 4.0, 4)),
    ]
    assert report["recommended_multipliers"] == (-1.0, 1.0)
    assert [adapter["name"] for adapter in inspect_adapters(str(GOLDEN / "library"))] == ["blunt", "calm"]
