from __future__ import annotations

import pytest
import torch
from conftest import hand_logits, make_model, random_vectors, set_vectors
from peft import LoraConfig, get_peft_model

from steer_adapter import SteerConfig
from steer_adapter.errors import AdapterNameError, ModelError, VectorError
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
