from __future__ import annotations

import pytest
from conftest import make_model
from peft import LoraConfig, get_peft_model

from steer_adapter import SteerConfig
from steer_adapter.errors import AdapterNameError, ConfigError, VectorError
from steer_adapter.sharing.source import adapters, fetch, load_config


@pytest.fixture
def library(tmp_path):
    model = get_peft_model(make_model(), SteerConfig(layers_to_transform=1))
    model.add_adapter("calm", SteerConfig(layers_to_transform=2))
    model.save_pretrained(tmp_path)
    return tmp_path


def test_a_folder_is_itself(tmp_path):
    assert fetch(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere", "a/b/c", "user/../x"])
def test_what_is_neither_folder_nor_id(name):
    with pytest.raises(ConfigError, match="neither a folder nor a Hub id|no folder"):
        fetch(name)


def test_what_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="no folder"):
        fetch(str(tmp_path / "file"))


def test_adapters_by_name(library):
    assert adapters(library, "x") == {"default": library, "calm": library / "calm"}
    assert adapters(library, "x", ["calm"]) == {"calm": library / "calm"}


@pytest.mark.parametrize("names", [["other"], ["../calm"], ["calm/"], "calm", [["calm"]]])
def test_names_that_are_not_there(library, names):
    with pytest.raises((AdapterNameError, ConfigError), match=r"expected some of \['calm', 'default'\]"):
        adapters(library, "x", names)


def test_an_empty_folder(tmp_path):
    with pytest.raises(ConfigError, match="without adapter_config.json"):
        adapters(tmp_path, "x")


def test_only_whole_vectors(library, tmp_path):
    assert load_config(library).layers_to_transform == [1]
    (library / "adapter_model.safetensors").unlink()
    with pytest.raises(VectorError, match="has no adapter_model.safetensors"):
        load_config(library)
    get_peft_model(make_model(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    with pytest.raises(ConfigError, match="an adapter of type 'LORA'"):
        load_config(tmp_path / "lora")
