from __future__ import annotations

import json
import os

import pytest
import torch
from conftest import HIDDEN, LAYERS, make_model, random_vectors, set_vectors
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from steer_adapter import SteerConfig
from steer_adapter.decoder import Decoder
from steer_adapter.errors import ConfigError, ModelError, VectorError
from steer_adapter.tuner.config import note_transfer


DECODER = Decoder(names=tuple(f"layers.{i}" for i in range(6)), hidden_size=8, model_type="llama")


@pytest.mark.parametrize(
    ("layers", "resolved"), [(None, [0, 1, 2, 3, 4, 5]), (2, [2]), (-1, [5]), ([3, -6, 0], [0, 3]), ([5, 1], [1, 5])]
)
def test_layers_are_resolved(layers, resolved):
    config = SteerConfig(layers_to_transform=layers)
    assert config.resolve(DECODER, None).layers_to_transform == resolved
    assert config.layers_to_transform == layers, "the caller's config is left alone"


@pytest.mark.parametrize("layers", [6, -7, [0, 6]])
def test_a_layer_out_of_range_is_refused(layers):
    with pytest.raises(ModelError, match="6 decoder layers: expected values from -6 to 5"):
        SteerConfig(layers_to_transform=layers).resolve(DECODER, None)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(multiplier=float("nan")), "multiplier.*finite"),
        (dict(multiplier=float("inf")), "multiplier.*finite"),
        (dict(multiplier="2"), "multiplier.*expected a number"),
        (dict(multiplier=True), "multiplier.*expected a number"),
        (dict(operation="ablate_all"), "operation.*received 'ablate_all', expected one of"),
        (dict(operation=["add"]), "operation"),
        (dict(layers_to_transform="15"), "layers_to_transform.*expected an integer"),
        (dict(layers_to_transform=[1.0]), "layers_to_transform.*expected an integer"),
        (dict(layers_to_transform=[True]), "layers_to_transform.*expected an integer"),
        (dict(layers_to_transform=[]), "empty list"),
        (dict(target_modules=[]), "empty list"),
        (dict(target_modules=[3]), "target_modules.*expected a string"),
        (dict(layers_to_transform=1, target_modules=["a"]), "both"),
        (dict(stack="encoder", target_modules=["a"]), "both `stack`='encoder' and `target_modules`"),
        (dict(stack=""), "`stack`: received '', expected the path of a module"),
        (dict(stack=3), "`stack`: received 3, expected a short text"),
        (dict(hidden_size=-4), "hidden_size.*positive integer"),
        (dict(num_hidden_layers=0), "num_hidden_layers.*positive integer"),
        (dict(format_version=2), "format_version.*received 2.*newer"),
        (dict(format_version=0), "format_version"),
        (dict(format_version="1"), "format_version"),
    ],
)
def test_bad_values_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        SteerConfig(**values)


@pytest.fixture
def adapter_dir(tmp_path):
    model = get_peft_model(make_model(), SteerConfig(layers_to_transform=[1, -1], multiplier=0.5))
    set_vectors(model, random_vectors([1, 3]))
    model.set_multiplier(7.0)
    model.save_pretrained(tmp_path)
    return tmp_path


def edit(folder, **values):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_what_is_saved(adapter_dir):
    saved = json.loads((adapter_dir / "adapter_config.json").read_text())
    wanted = dict(
        peft_type="STEER",
        layers_to_transform=[1, 3],
        multiplier=0.5,  # the initial strength, never the live one
        operation="add",
        format_version=1,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        model_type="llama",
    )
    assert {key: saved[key] for key in wanted} == wanted
    assert PeftConfig.from_pretrained(adapter_dir).is_saved


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        (dict(hidden_size=HIDDEN * 2), (ModelError, VectorError), "hidden_size=64|shape"),
        (dict(num_hidden_layers=30), ModelError, "num_hidden_layers=30.*num_hidden_layers=4"),
        (dict(num_hidden_layers=None), ConfigError, "lacks `num_hidden_layers`"),
        (dict(layers_to_transform=[1, 9]), ConfigError, "expected values from 0 to 3"),
        (dict(format_version=99), ConfigError, "format_version"),
        (dict(operation="ablate"), ConfigError, "operation"),
        (dict(multiplier=float("nan")), ConfigError, "multiplier"),
    ],
)
def test_a_misfit_is_refused_before_anything_is_injected(adapter_dir, native, values, error, message):
    edit(adapter_dir, **values)
    model = make_model()
    before = list(model.state_dict())
    with pytest.raises(error, match=message):
        model.load_adapter(adapter_dir) if native else PeftModel.from_pretrained(model, adapter_dir)
    assert list(model.state_dict()) == before
    assert not any("steering" in name for name, _ in model.named_modules())
    assert not hasattr(model, "peft_config") or not model.peft_config


def test_a_newer_format_with_unknown_keys_is_an_error_not_a_warning(adapter_dir):
    edit(adapter_dir, format_version=2, token_gate="last")
    with pytest.warns(UserWarning, match="token_gate"), pytest.raises(ConfigError, match="format_version"):
        PeftModel.from_pretrained(make_model(), adapter_dir)


def test_one_config_serves_two_models():
    config = SteerConfig(init_weights=False)
    first = get_peft_model(make_model(), config)
    assert first.peft_config["default"] is config and config.layers_to_transform == [0, 1, 2, 3], (
        "as with a LoraConfig"
    )
    shorter = make_model("gpt2")
    shorter.transformer.h, shorter.config.n_layer = shorter.transformer.h[:2], 2
    again = get_peft_model(shorter, config)
    assert again.peft_config["default"].layers_to_transform == [0, 1], "all layers of the other model too"
    assert config.layers_to_transform == [0, 1, 2, 3], "the first model's books stay"
    with torch.no_grad():
        assert torch.isfinite(again(torch.tensor([[1, 2]])).logits).all(), "a fresh vector, not one to be loaded"


def test_another_checkpoint_of_the_same_shape_is_said_once(adapter_dir, caplog):
    edit(adapter_dir, base_model_name_or_path="org/made-for")
    for _ in range(2):
        model = make_model()
        model.name_or_path = "org/put-on"
        PeftModel.from_pretrained(model, adapter_dir)
    said = [record.getMessage() for record in caplog.records if "org/made-for" in record.getMessage()]
    assert len(said) == 1 and "org/put-on" in said[0] and "transfers" in said[0]


def test_what_was_said_is_not_remembered_for_ever():
    for number in range(1000):
        note_transfer(f"org/model-{number}", f"org/model-{number}")
    assert note_transfer.cache_info().currsize < 1000


def test_the_same_model_by_another_path_is_not_another(adapter_dir, caplog):
    edit(adapter_dir, base_model_name_or_path="org/model")
    model = make_model()
    model.name_or_path = "/data/model"
    PeftModel.from_pretrained(model, adapter_dir)
    assert not caplog.records


@pytest.mark.parametrize(
    "text", ["[]", "{}", '{"peft_type": "NOTHING"}', '{"peft_type": ["STEER"]}', '{"peft_type": "STEER", "cls": 1}']
)
def test_what_is_no_config(adapter_dir, text):
    (adapter_dir / "adapter_config.json").write_text(text)
    with pytest.raises(ConfigError, match="expected"):
        SteerConfig.from_pretrained(adapter_dir)


def test_names_are_saved_and_not_a_regex(tmp_path):
    model = get_peft_model(make_model(), SteerConfig(target_modules=r"model\.layers\.[02]"))
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["target_modules"] == ["model.layers.0", "model.layers.2"]
    assert (
        PeftModel.from_pretrained(make_model(), tmp_path).peft_config["default"].target_modules
        == saved["target_modules"]
    )


def test_vectors_in_the_wrong_place_are_refused_before_anything_is_injected(adapter_dir):
    path = adapter_dir / "adapter_model.safetensors"
    tensors = {key.replace("layers.3", "layers.2"): value for key, value in load_file(path).items()}
    save_file(tensors, path)
    edit(adapter_dir, layers_to_transform=None)
    model = make_model()
    with pytest.raises(VectorError, match="received vectors for .*layers.1.*expected .*layers.0"):
        PeftModel.from_pretrained(model, adapter_dir)
    assert not any("steering" in name for name, _ in model.named_modules())


def test_the_revision_of_the_base_model(tmp_path):
    model = make_model()
    model.name_or_path = "/cache/hub/models--org--model/snapshots/0123abcd"
    assert get_peft_model(model, SteerConfig()).peft_config["default"].revision == "0123abcd"


def test_a_value_set_after_filling_in_counts():
    config = SteerConfig(layers_to_transform=-1)
    get_peft_model(make_model(), config)
    assert config.layers_to_transform == [3]
    config.layers_to_transform = 1
    assert get_peft_model(make_model(), config).peft_config["default"].layers_to_transform == [1]


def test_adapters_do_not_share_a_config():
    config = SteerConfig(layers_to_transform=1)
    model = get_peft_model(make_model(), config)
    model.add_adapter("second", config)
    assert model.peft_config["second"] is not config and model.peft_config["second"] == config


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_the_weights_are_as_readable_as_the_config(tmp_path, umask):
    before = os.umask(umask)
    try:
        get_peft_model(make_model(), SteerConfig(layers_to_transform=1)).save_pretrained(tmp_path)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == dict.fromkeys(["README.md", "adapter_config.json", "adapter_model.safetensors"], 0o666 & ~umask)


def test_a_pickle_is_not_saved_as_an_adapter(tmp_path):
    model = get_peft_model(make_model(), SteerConfig(layers_to_transform=1))
    with pytest.raises(VectorError, match="Save without safe_serialization=False"):
        model.save_pretrained(tmp_path, safe_serialization=False)
    assert not (tmp_path / "adapter_config.json").exists()
    model.save_pretrained(tmp_path)
    PeftModel.from_pretrained(make_model(), tmp_path)
