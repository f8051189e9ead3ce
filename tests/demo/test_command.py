from __future__ import annotations

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from steer_adapter import cli, verify
from steer_adapter.demo import command


@pytest.fixture
def tiny(base_dir, monkeypatch):
    monkeypatch.setattr(command, "smollm2", lambda: base_dir())
    monkeypatch.setattr(command, "HELD_OUT", 4)


def test_the_whole_way_on_a_tiny_model(tiny, base_dir, tmp_path, capsys):
    out = tmp_path / "demo"
    assert cli.main(["demo", "--output", str(out), "--max-steps", "3", "--layer", "1"]) == 0
    assert sorted(p.name for p in out.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "margins.png", "report.md",
    ]  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(base_dir())
    steered = PeftModel.from_pretrained(model, out)
    assert verify(steered) and list(steered.peft_config) == ["default"]
    report, printed = (out / "report.md").read_text(), capsys.readouterr().out
    for text in (report, printed):
        assert all(question in text for question in command.QUESTIONS)
        assert "| +2 |" in text and "mean difference, same norm" in text
    assert "|v| = " in report


def test_mean_difference_is_compared_at_the_same_norm(tiny, tmp_path, monkeypatch):
    norms = []
    measure = command.sweep

    def spy(model, *args, **kwargs):
        (layer,) = [m for m in model.modules() if hasattr(m, "steer_vector")]
        norms.append(float(layer.steer_vector[layer.active_adapters[0]].norm()))
        return measure(model, *args, **kwargs)

    monkeypatch.setattr(command, "sweep", spy)
    assert cli.main(["demo", "--output", str(tmp_path), "--max-steps", "2", "--layer", "1"]) == 0
    assert len(norms) == 2 and norms[0] > 0 and norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_a_folder_that_holds_something(tiny, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    assert cli.main(["demo", "--output", str(tmp_path)]) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
