from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from conftest import HIDDEN, hand_logits, make_model, random_vectors, set_vectors
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from steer_adapter import SteerConfig, load_library
from steer_adapter.errors import AdapterNameError, ConfigError, ModelError, SteerError, VectorError
from steer_adapter.sharing.loading import load_adapters


LAYERS = {"calm": [1], "blunt": [0, 2]}


@pytest.fixture
def folder(tmp_path):
    model = get_peft_model(make_model(), SteerConfig(layers_to_transform=LAYERS["calm"]), adapter_name="calm")
    model.add_adapter("blunt", SteerConfig(layers_to_transform=LAYERS["blunt"]))
    for seed, (name, layers) in enumerate(LAYERS.items()):
        set_vectors(model, random_vectors(layers, seed=seed), name)
    model.save_pretrained(tmp_path)
    return tmp_path


def check(model, input_ids, base=None):
    for seed, (name, layers) in enumerate(LAYERS.items()):
        if name in model.peft_config:
            model.set_adapter(name)
            with torch.no_grad():
                received = model(input_ids).logits
            wanted = hand_logits(base or make_model(), input_ids, random_vectors(layers, seed=seed))
            assert (received - wanted).abs().max() <= 1e-5


def test_all(folder, input_ids):
    model = load_adapters(make_model(), str(folder))
    assert list(model.peft_config) == ["blunt", "calm"]
    check(model, input_ids)


def test_by_name_and_one_after_the_other(folder, input_ids):
    model = load_adapters(make_model(), str(folder), names=["calm"])
    assert list(model.peft_config) == ["calm"]
    assert load_adapters(model, str(folder), names=["blunt"]) is model
    check(model, input_ids)
    with pytest.raises(AdapterNameError, match="carries a vector of that name"):
        load_adapters(model, str(folder))
    assert list(model.peft_config) == ["calm", "blunt"]


def test_on_a_lora(folder, input_ids):
    lora = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    torch.manual_seed(3)
    tuned = get_peft_model(make_model(), lora)
    with torch.no_grad():
        plain = tuned(input_ids).logits
    model = load_adapters(tuned, str(folder))
    assert list(model.peft_config) == ["blunt", "calm"]
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(input_ids).logits, plain)


def untouched(model):
    return not any("steering" in name for name, _ in model.named_modules()) and not hasattr(model, "peft_config")


def test_one_broken_and_none_is_loaded(folder):
    path = folder / "calm" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    model = make_model()
    with pytest.raises(VectorError, match="cut short"):
        load_adapters(model, str(folder))
    assert untouched(model)


@pytest.mark.parametrize("text", ["{", '{"hidden_size": 32}', '{"peft_type": 3}'])
def test_one_that_can_not_be_read_is_not_passed_by(folder, text):
    (folder / "calm" / "adapter_config.json").write_text(text)
    model = make_model()
    with pytest.raises(ConfigError, match="calm"):
        load_adapters(model, str(folder))
    assert untouched(model)


def test_one_misfit_and_none_is_loaded(folder):
    other = get_peft_model(make_model("gpt_neox"), SteerConfig(layers_to_transform=1), adapter_name="far")
    other.save_pretrained(folder)
    config = folder / "far" / "adapter_config.json"
    config.write_text(config.read_text().replace('"num_hidden_layers": 4', '"num_hidden_layers": 5'))
    model = make_model()
    with pytest.raises(ModelError, match="num_hidden_layers=5.*num_hidden_layers=4"):
        load_adapters(model, str(folder))
    assert untouched(model)


def test_a_folder_whose_name_can_be_no_adapter(folder):
    (folder / "calm").rename(folder / "v1.5")
    model = make_model()
    with pytest.raises(AdapterNameError, match="without dots"):
        load_adapters(model, str(folder))
    assert untouched(model)


def test_a_library_of_vectors_at_any_depth(folder):
    (folder / "customers" / "of" / "last year").mkdir(parents=True)
    (folder / "calm").rename(folder / "customers" / "of" / "last year" / "17")
    library = load_library(folder)
    assert library.names == ("blunt", "customers/of/last year/17")
    for name, layers, seed in (("blunt", [0, 2], 1), ("customers/of/last year/17", [1], 0)):
        wanted = random_vectors(layers, seed=seed)
        assert library[name].keys() == wanted.keys()
        assert all(torch.equal(library[name][layer], wanted[layer]) for layer in layers)


def damaged(path: Path, change) -> None:
    tensors = load_file(path / "adapter_model.safetensors")
    save_file(change(tensors), path / "adapter_model.safetensors")


def reconfigured(path: Path, **changes) -> None:
    path = path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


DAMAGES = [
    (lambda p: damaged(p, lambda t: {k: v * float("nan") for k, v in t.items()}), VectorError, "calm.*NaN"),
    (lambda p: damaged(p, lambda t: {**t, "model.norm.weight": torch.ones(3)}), VectorError, "model.norm.weight"),
    (lambda p: (p / "adapter_model.safetensors").unlink(), VectorError, "calm.*has no adapter_model.safetensors"),
    (lambda p: (p / "adapter_config.json").write_text("["), ConfigError, "calm.*can't be read as JSON"),
    (lambda p: reconfigured(p, peft_type="LORA"), ConfigError, "calm.*type 'LORA', expected a steering vector"),
    (lambda p: reconfigured(p, hidden_size=64), VectorError, "shape"),
    (lambda p: reconfigured(p, num_hidden_layers=5), ModelError, "different shapes"),
    (lambda p: reconfigured(p, format_version=99), ConfigError, "format_version"),
    (lambda p: reconfigured(p, layers_to_transform=None, target_modules=["layers.1"]), SteerError, "calm.*takes vec"),
    (lambda p: shutil.copytree(p, p.parent, dirs_exist_ok=True), AdapterNameError, "in a folder of its own"),
]


@pytest.mark.parametrize(("damage", "error", "message"), DAMAGES)
def test_one_damaged_vector_of_a_library_is_named(folder, damage, error, message):
    damage(folder / "calm")
    with pytest.raises(error, match=message):
        load_library(folder)


def test_no_library(tmp_path):
    with pytest.raises(VectorError, match="no adapter_config.json in any subfolder"):
        load_library(tmp_path)
    with pytest.raises(ConfigError, match="where there is no folder"):
        load_library(tmp_path / "nowhere")


def test_a_thousand_vectors_load_within_seconds(tmp_path):
    model = get_peft_model(make_model(), SteerConfig(layers_to_transform=1))
    model.save_pretrained(tmp_path / "0000")
    for number in range(1, 1000):
        shutil.copytree(tmp_path / "0000", tmp_path / f"{number:04}")
    begin = time.perf_counter()
    assert load_library(tmp_path).table.shape == (1000, HIDDEN)
    assert time.perf_counter() - begin < 10
