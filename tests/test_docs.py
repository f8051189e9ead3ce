"""Every code block of the README and the docs runs, in the order in which a reader meets it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file

from steer_adapter import SteerConfig
from steer_adapter.errors import SteerError


ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks(path: str) -> list[tuple[str, str]]:
    return BLOCK.findall((ROOT / path).read_text(encoding="utf-8"))


def run_page(path: str, skip: tuple[str, ...] = ()) -> dict[str, Any]:
    """Bash and Python of one page, in the current folder; the Python shares its names, which come back."""
    names: dict[str, Any] = {"__name__": "__main__"}
    environment = dict(os.environ, PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    for language, code in blocks(path):
        if language == "bash" and code not in skip:
            subprocess.run(["bash", "-euo", "pipefail", "-c", code], check=True, env=environment)
        elif language == "python":
            exec(compile(code, path, "exec"), names)
        else:
            assert language in ("bash", "text"), f"{path} has a block that no test runs: {code}"
    return names


def commands() -> tuple[str, ...]:
    return tuple(code for language, code in blocks("README.md") if language == "bash")


def test_concepts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_page("docs/concepts.md")


@pytest.mark.slow
def test_share(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_page("docs/share.md")


def test_format(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run_page("docs/format.md")
    for folder in ("llama", "gpt2", "targets", "library/calm"):
        path = ROOT / "tests" / "golden" / folder / "adapter_model.safetensors"
        wanted = {key: value.tolist() for key, value in load_file(path).items()}
        _, vectors = names["read_vectors"](path.parent)
        assert {f"base_model.model.{module}.steering.steer_vector": v for module, v in vectors.items()} == wanted


def reader() -> Any:
    (code,) = [code for language, code in blocks("docs/format.md") if "def read_vectors" in code]
    names: dict[str, Any] = {}
    exec(compile(code, "docs/format.md", "exec"), names)
    assert len(code.splitlines()) < 65
    return names["read_vectors"]


KEY = "base_model.model.model.layers.{}.steering.steer_vector"


def write(folder: Path, tensors: dict[str, torch.Tensor], **changes: object) -> Path:
    """An adapter on the layers 1 and 3 of a model of 4 and width 8, but for the changes."""
    config = {"peft_type": "STEER", "format_version": 1, "hidden_size": 8, "num_hidden_layers": 4, "stack": None,
              "target_modules": None, "layers_to_transform": [1, 3], "operation": "add"}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def test_the_printed_reader_follows_its_page(tmp_path):
    read = reader()
    vectors = {KEY.format(layer): torch.arange(8) + torch.tensor(layer / 2) for layer in (1, 3)}
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        saved = {key: vector.to(dtype) for key, vector in vectors.items()}
        multiplier, found = read(write(tmp_path, {**saved, "base_model.model.lm_head.weight": torch.ones(2)}))
        assert multiplier == 1 and list(found) == ["model.layers.1", "model.layers.3"]
        assert found["model.layers.3"] == [i + 1.5 for i in range(8)]
    assert len(read(write(tmp_path, {KEY.format(1): torch.ones(8)}, layers_to_transform=1))[1]) == 1
    every = {KEY.format(layer): torch.ones(8) for layer in range(4)}
    assert len(read(write(tmp_path, every, layers_to_transform=None))[1]) == 4
    blocks = {"target_modules": ["lm_head"], "layers_to_transform": None, "num_hidden_layers": 1}
    saved = {"base_model.model.lm_head.steering.steer_vector": torch.ones(8)}
    assert list(read(write(tmp_path, saved, **blocks))[1]) == ["lm_head"]


@pytest.mark.parametrize(
    ("tensors", "changes"),
    [
        ({"plain": torch.ones(8)}, {}),
        ({"model.layers.1.steering.steer_vector": torch.ones(8)}, {"layers_to_transform": [1]}),
        ({KEY.format(1) + "\n": torch.ones(8)}, {"layers_to_transform": [1]}),
        ({KEY.format(1): torch.ones(9)}, {"layers_to_transform": [1]}),
        ({KEY.format(1): torch.ones(8, dtype=torch.int32)}, {"layers_to_transform": [1]}),
        ({KEY.format(1): torch.full((8,), float("nan"))}, {"layers_to_transform": [1]}),
        ({KEY.format(1): torch.full((8,), 1e300, dtype=torch.float64)}, {"layers_to_transform": [1]}),
        ({KEY.format(1): torch.ones(8)}, {}),
        ({KEY.format(2): torch.ones(8)}, {"layers_to_transform": [1]}),
        ({KEY.format(1): torch.ones(8)}, {"layers_to_transform": [1, 1]}),
        ({KEY.format(1): torch.ones(8)}, {"layers_to_transform": [-3]}),
        ({KEY.format(9): torch.ones(8)}, {"layers_to_transform": [9]}),
        ({KEY.format(1): torch.ones(8)}, {"layers_to_transform": [1], "format_version": 2}),
        ({KEY.format(1): torch.ones(8)}, {"layers_to_transform": [1], "operation": "ablate"}),
        ({KEY.format(1): torch.ones(8)}, {"layers_to_transform": [1], "token_scope": "prompt"}),
    ],
)
def test_the_printed_reader_refuses_what_the_package_refuses(tmp_path, tensors, changes):
    with pytest.raises(ValueError, match="."):
        reader()(write(tmp_path, tensors, **changes))
    if "token_scope" not in changes:
        with pytest.raises(SteerError):
            SteerConfig.from_pretrained(tmp_path)


SLOW = ("scale.md",)  # it starts processes
PAGES = sorted(path.name for path in (ROOT / "docs" / "how_to").glob("*.md"))


@pytest.mark.parametrize("page", [pytest.param(p, marks=[pytest.mark.slow] * (p in SLOW)) for p in PAGES])
def test_how_to(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_page(f"docs/how_to/{page}")


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`", "ignore:You are trying to modify a model")
def test_peft(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_page("docs/peft.md")


@pytest.mark.real_model
@pytest.mark.slow
def test_quickstart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_page("docs/quickstart.md")


@pytest.mark.real_model
def test_readme(tmp_path, monkeypatch, capsys):
    from transformers import AutoModelForCausalLM

    from steer_adapter import SteerConfig
    from steer_adapter.demo.model import smollm2

    monkeypatch.chdir(tmp_path)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(smollm2()), SteerConfig(layers_to_transform=15))
    with torch.no_grad():
        model.get_parameter("base_model.model.model.layers.15.steering.steer_vector.default").normal_()
    model.save_pretrained("steer-demo")  # in the place of what the first command would have left
    run_page("README.md", skip=commands())
    printed = capsys.readouterr().out
    assert "arrives" in printed and "-1.0 " in printed and "1.0 " in printed


def test_the_two_commands_are_what_ci_runs():
    script = (ROOT / ".ci" / "run").read_text()
    assert len(commands()) == 2
    for command in commands():
        assert command.strip() in script


def test_links_lead_somewhere():
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
