from __future__ import annotations

import copy
import json

import pytest
from conftest import VOCAB, make_model, random_vectors, set_vectors
from peft import get_peft_model
from transformers import T5Config, T5ForConditionalGeneration

from steer_adapter import SteerConfig
from steer_adapter.sharing.inspection import card_warnings, fit, inspect_adapters
from steer_adapter.tuner.facts import facts_of


KNOWN = {
    "license": "mit",
    "behavior": "calm",
    "data": {"sha256": "0" * 64},
    "margins": {"1": {"margin": 2.0}},
    "side_effects": {"perplexity": "+1 %"},
    "residual_norms": {"1": 2.0},
}


@pytest.fixture
def folder(tmp_path, base_dir, load):
    model = get_peft_model(load(), SteerConfig(layers_to_transform=1, multiplier=2.0, provenance=KNOWN))
    model.add_adapter("calm", SteerConfig(layers_to_transform=[0, 2]))
    set_vectors(model, random_vectors([1]))
    set_vectors(model, random_vectors([0, 2]), "calm")
    model.save_pretrained(tmp_path)
    return tmp_path


def test_what_is_found(folder, base_dir):
    first, second = inspect_adapters(str(folder))
    norm = float(random_vectors([1])[1].norm())
    assert first["name"] == "default" and second["name"] == "calm"
    assert first["layers"] == [
        {"layer": "1", "norm": pytest.approx(norm), "residual_norm": 2.0, "dose": pytest.approx(2.0 * norm / 2.0)}
    ]
    assert first["base_model"] == str(base_dir()) and first["model_type"] == "llama"
    assert (first["operation"], first["multiplier"], first["format_version"]) == ("add", 2.0, 1)
    assert first["recommended_multipliers"] == (0.0, 1.0) and first["license"] == "mit"
    assert [layer["layer"] for layer in second["layers"]] == ["0", "2"] and second["layers"][0]["dose"] is None
    json.dumps([first, second], allow_nan=False)


def test_no_model_is_loaded(folder, monkeypatch):
    monkeypatch.setattr("torch.nn.Module.__init__", lambda *args: pytest.fail("a module was made"))
    assert len(inspect_adapters(str(folder), ["calm"])) == 1


def test_a_broken_one_among_others(folder):
    (folder / "calm" / "adapter_model.safetensors").write_bytes(b"cut")
    first, second = inspect_adapters(str(folder))
    assert "error" not in first and "cut short" in second["error"]


def test_warnings(folder):
    first, second = inspect_adapters(str(folder))
    local = [w for w in first["card_warnings"] if "local path" in w]
    assert local and set(first["card_warnings"]) - set(local) == {"the revision of the base model is not recorded"}
    assert {"no license was chosen", "the data is not recorded", "side effects were not measured"} <= set(
        second["card_warnings"]
    )
    (folder / "README.md").unlink()
    assert "there is no README.md" in card_warnings(facts_of(folder, "x"))


def test_fit(folder, base_dir, tmp_path):
    (report, _) = inspect_adapters(str(folder))
    assert fit(report, str(base_dir())) == "fits"
    assert fit(report, str(base_dir("qwen3"))).startswith("fits by its shape, but was made for")
    other = copy.deepcopy(make_model().config)
    other.num_hidden_layers = 9
    other.save_pretrained(tmp_path / "nine")
    assert "num_hidden_layers=4" in fit(report, str(tmp_path / "nine"))


def test_one_whose_config_can_not_be_read_is_there_too(folder):
    (folder / "calm" / "adapter_config.json").write_text("{")
    first, second = inspect_adapters(str(folder))
    assert "error" not in first and second["name"] == "calm" and "can't be read as JSON" in second["error"]


def test_fit_of_named_blocks_and_of_other_stacks(tmp_path, base_dir, load):
    get_peft_model(load(), SteerConfig(target_modules=["layers.1", "layers.3"])).save_pretrained(tmp_path / "blocks")
    (report,) = inspect_adapters(str(tmp_path / "blocks"))
    assert report["target_modules"] and report["num_hidden_layers"] == 2
    assert fit(report, str(base_dir())).startswith("fits by its hidden size")
    sizes = dict(vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_heads=4, pad_token_id=0, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(T5Config(**sizes, num_layers=3, num_decoder_layers=4))
    model.save_pretrained(tmp_path / "t5")
    for stack in ("encoder", None):
        model = T5ForConditionalGeneration.from_pretrained(tmp_path / "t5")
        folder = tmp_path / str(stack)
        get_peft_model(model, SteerConfig(layers_to_transform=1, stack=stack)).save_pretrained(folder)
        (report,) = inspect_adapters(str(folder))
        assert (report["stack"], report["num_hidden_layers"]) == (stack, 3 if stack else 4)
        assert fit(report, str(tmp_path / "t5")) == "fits"
        assert fit(report, str(base_dir("gpt2"))).startswith("fits by" if stack is None else "does not fit")
        assert fit({**report, "hidden_size": 48}, str(tmp_path / "t5")).startswith("does not fit")
