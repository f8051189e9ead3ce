from __future__ import annotations

import pytest
import torch
from conftest import HIDDEN, make_model, random_vectors, set_vectors
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from steer_adapter import SteerConfig
from steer_adapter.errors import VectorError
from steer_adapter.tuner.saved import check_place, checkpoint_key, match_by_layer, place_of, read_vectors


KEY = "base_model.model.model.layers.1.steering.steer_vector"


@pytest.mark.parametrize(
    "key",
    [
        KEY,
        "base_model.model.base_model.model.model.layers.1.steering.steer_vector",
        "base_model.model.base_model.model.base_model.model.model.layers.1.steering.steer_vector",
        "base_model.model._orig_mod.model.layers.1.steering.steer_vector",
        "base_model.model.model.layers.1._fsdp_wrapped_module.steering.steer_vector",
        "base_model.model.model.layers.1._checkpoint_wrapped_module.steering.steer_vector",
    ],
)
def test_the_saved_key_does_not_depend_on_wrappers(key):
    assert checkpoint_key(key) == KEY


def test_a_key_without_the_prefix_stays_without():
    assert checkpoint_key("model.layers.1.steering.steer_vector") == "model.layers.1.steering.steer_vector"


def test_keys_of_other_paths_are_matched_by_layer():
    model = [f"base_model.model.model.language_model.layers.{i}.steering.steer_vector" for i in (2, 11)]
    file = [f"base_model.model.model.layers.{i}.steering.steer_vector" for i in (11, 2, 5)]
    assert match_by_layer(model, file) == {file[0]: model[1], file[1]: model[0]}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({KEY: torch.zeros(HIDDEN), "score.weight": torch.zeros(4, 4)}, "received the key 'score.weight'"),
        ({KEY + "\n": torch.zeros(HIDDEN)}, "received the key"),
        ({KEY: torch.zeros(HIDDEN + 1)}, r"shape \[33\], expected floating point of shape \[32\]"),
        ({KEY: torch.zeros(1, HIDDEN)}, "shape"),
        ({KEY: torch.zeros(HIDDEN, dtype=torch.int64)}, "I64"),
        ({KEY: torch.full((HIDDEN,), float("nan"))}, "NaN or infinity"),
        ({KEY: torch.full((HIDDEN,), float("inf"))}, "NaN or infinity"),
        ({KEY: torch.zeros(HIDDEN), KEY.replace("1", "2"): torch.zeros(HIDDEN)}, "received 2 steering vectors"),
        ({}, "received 0 steering vectors"),
    ],
)
def test_what_a_file_may_not_hold(tmp_path, tensors, message):
    save_file(tensors, tmp_path / "file.safetensors")
    with pytest.raises(VectorError, match=message):
        read_vectors(tmp_path / "file.safetensors", HIDDEN, [1])


def test_the_layers_of_the_config(tmp_path):
    save_file({KEY: torch.zeros(HIDDEN)}, tmp_path / "file.safetensors")
    read_vectors(tmp_path / "file.safetensors", HIDDEN, [1])
    with pytest.raises(VectorError, match=r"received vectors for the layers \[1\], expected \[2\]"):
        read_vectors(tmp_path / "file.safetensors", HIDDEN, [2])


def test_vectors_that_have_no_place():
    names = ["base_model.model.model.layers.1", "base_model.model.model.layers.3"]
    keys = [f"base_model.model.model.layers.{i}.steering.steer_vector" for i in (1, 3)]
    check_place(keys, names, "here")
    check_place([key.replace("model.layers", "language_model.layers") for key in keys], names, "here")
    for wrong in (keys[:1], [*keys, keys[0].replace("1", "2")], [keys[0], keys[1].replace(".3.", ".03.")]):
        with pytest.raises(VectorError, match="^here: received vectors for"):
            check_place(wrong, names, "here")


@pytest.mark.parametrize("keys", [[KEY, KEY.replace("base_model.model.", "base_model.model.base_model.model.")]])
def test_two_keys_for_one_place(tmp_path, keys):
    save_file({key: torch.zeros(HIDDEN) for key in keys}, tmp_path / "file.safetensors")
    with pytest.raises(VectorError, match="two vectors for the same place"):
        read_vectors(tmp_path / "file.safetensors", HIDDEN, None)


def test_a_large_head_is_not_loaded_by_the_check(tmp_path, monkeypatch):
    tensors = {KEY: torch.zeros(HIDDEN), "base_model.model.lm_head.weight": torch.zeros(1000, HIDDEN)}
    save_file(tensors, tmp_path / "file.safetensors")
    seen = []
    monkeypatch.setattr(
        "steer_adapter.tuner.saved.load_tensors", lambda path, keys: seen.extend(keys) or {KEY: torch.zeros(HIDDEN)}
    )
    with pytest.warns(UserWarning, match="left out"):
        assert list(read_vectors(tmp_path / "file.safetensors", HIDDEN, [1])) == [KEY] == seen


def test_places():
    assert place_of(KEY) == "1"
    assert place_of("base_model.model.lm_head.steering.steer_vector") == "lm_head"


@pytest.fixture
def adapter_dir(tmp_path):
    model = get_peft_model(make_model(), SteerConfig(layers_to_transform=[1, 3]))
    set_vectors(model, random_vectors([1, 3]))
    model.save_pretrained(tmp_path)
    return tmp_path


def test_the_file(adapter_dir):
    tensors = load_file(adapter_dir / "adapter_model.safetensors")
    assert {key: (list(t.shape), t.dtype) for key, t in tensors.items()} == {
        KEY.replace("1", layer): ([HIDDEN], torch.float32) for layer in ("1", "3")
    }


@pytest.mark.parametrize("keep", [0, 4, 60, -1])
def test_a_file_cut_short_is_refused_and_the_model_is_untouched(adapter_dir, keep):
    path = adapter_dir / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    model = make_model()
    before = model.state_dict().keys()
    with pytest.raises(VectorError, match="cut short"):
        PeftModel.from_pretrained(model, adapter_dir)
    assert model.state_dict().keys() == before

    steered = get_peft_model(model, SteerConfig(layers_to_transform=2))
    with pytest.raises(VectorError, match="cut short"):
        steered.load_adapter(adapter_dir, "other")
    assert list(steered.peft_config) == ["default"]


def test_resized_embeddings_that_came_along_are_left_out(load, tmp_path):
    base = load()
    base.resize_token_embeddings(100)
    model = get_peft_model(base, SteerConfig(layers_to_transform=[1]))
    set_vectors(model, random_vectors([1]))
    with pytest.warns(UserWarning, match="resized"):
        model.save_pretrained(tmp_path)
    assert len(load_file(tmp_path / "adapter_model.safetensors")) > 1, "PEFT adds them"
    plain = load()
    before = plain.lm_head.weight.clone()
    with pytest.warns(UserWarning, match="are left out"):
        again = PeftModel.from_pretrained(plain, tmp_path)
    assert torch.equal(plain.lm_head.weight, before)
    vector = again.get_parameter("base_model.model.model.layers.1.steering.steer_vector.default")
    assert torch.equal(vector, random_vectors([1])[1])


def test_a_config_without_its_weights(adapter_dir):
    (adapter_dir / "adapter_model.safetensors").unlink()
    assert SteerConfig.from_pretrained(adapter_dir).layers_to_transform == [1, 3], "the config alone may be read"
    model = make_model()
    with pytest.raises(VectorError, match="an adapter config without adapter_model.safetensors"):
        PeftModel.from_pretrained(model, adapter_dir)
    assert not any("steering" in name for name, _ in model.named_modules())
