"""Every code block of the README and the docs runs, in the order in which a reader meets it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file


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
