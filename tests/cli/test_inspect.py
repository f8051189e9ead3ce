from __future__ import annotations

import json

import pytest
from conftest import make_model, random_vectors, set_vectors
from peft import get_peft_model
from safetensors.torch import load_file, save_file

from steer_adapter import SteerConfig, cli
from steer_adapter.cli.inspect import plain


KEY = "base_model.model.model.layers.2.steering.steer_vector"


@pytest.fixture
def folder(tmp_path):
    known = {"residual_norms": {"1": 2.0}, "margins": {"-1": {"margin": -2.0}, "1": {"margin": 3.5}}, "method": "bipo"}
    model = get_peft_model(make_model(), SteerConfig(layers_to_transform=1, provenance=known))
    model.add_adapter("calm", SteerConfig(layers_to_transform=2))
    set_vectors(model, random_vectors([1]))
    model.save_pretrained(tmp_path)
    return tmp_path


def test_for_people(folder, capsys):
    assert cli.main(["inspect", str(folder)]) == 0
    printed = capsys.readouterr().out
    norm = float(random_vectors([1])[1].norm())
    for words in (
        "default\n", "\ncalm\n", f"layer 1: |v| {norm:.4g}, dose {norm / 2:.3g}", "add, tokens: all, multiplier 1",
        "method:       bipo", "margin at +1: +3.5 nats", "margin at -1: -2 nats", "multipliers -1 to +1",
        "card: no license was chosen", "llama, 4 layers, hidden size 32",
    ):  # fmt: skip
        assert words in printed, words


def test_for_programs(folder, capsys):
    assert cli.main(["inspect", str(folder), "--json", "--name", "calm"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["source"] == str(folder)
    assert [adapter["name"] for adapter in report["adapters"]] == ["calm"]
    assert report["adapters"][0]["layers"][0]["layer"] == "2"


def test_a_model_to_compare_with(folder, base_dir, capsys):
    assert cli.main(["inspect", str(folder), "--model", str(base_dir()), "--name", "calm"]) == 0
    assert "fit:          fits" in capsys.readouterr().out


def test_a_broken_one_is_1_after_the_others_are_shown(folder, capsys):
    (folder / "calm" / "adapter_config.json").write_text('{"peft_type": "STEER", "hidden_size": -1}')
    assert cli.main(["inspect", str(folder)]) == 1
    captured = capsys.readouterr()
    assert "layer 1" in captured.out and "BROKEN" in captured.out and "error: calm: `hidden_size`" in captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["./nowhere"], "no folder"), (["."], "adapter_config.json"), (["a b"], "neither a folder nor a Hub id")],
)
def test_bad_input_is_1(tmp_path, monkeypatch, arguments, message, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["inspect", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_a_strangers_text_does_not_drive_the_terminal():
    assert plain("a\x1b[2J") == r"'a\x1b[2J'" and plain("fine") == "fine"
    assert len(plain("x" * 5000)) == 400


@pytest.mark.parametrize(("residual", "multiplier"), [(1e-320, 1e38), (0, 1.0)])
def test_a_dose_that_overflows_blinds_nobody(folder, capsys, residual, multiplier):
    path = folder / "calm" / "adapter_config.json"
    config = json.loads(path.read_text())
    config |= {"multiplier": multiplier, "provenance": {"residual_norms": {"2": residual}}}
    path.write_text(json.dumps(config))
    (vector,) = load_file(folder / "adapter_model.safetensors").values()
    save_file({KEY: vector}, folder / "calm" / "adapter_model.safetensors")
    assert cli.main(["inspect", str(folder), "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)["adapters"]
    assert first["layers"][0]["dose"] > 0 and second["layers"][0]["dose"] is None
    assert any("gives no finite dose" in warning for warning in second["card_warnings"])
    assert not any("dose" in warning for warning in first["card_warnings"])
    assert cli.main(["inspect", str(folder)]) == 0
    assert "dose not finite" in capsys.readouterr().out
