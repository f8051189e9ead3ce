from __future__ import annotations

import json

import pytest
from conftest import make_model
from peft import AdaLoraConfig, LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.config import PeftConfigMixin

from steer_adapter import SteerConfig
from steer_adapter.errors import ConfigError, SteerError, UnknownMethodError
from steer_adapter.tuner.config_file import guard_reading, names_us, read_config


@pytest.mark.parametrize(
    ("text", "ours"),
    [
        ('{"peft_type": "STEER"}', True),
        ('{"a": 1,\n "peft_type"\t:\r\n "STEER", "b": 2}', True),
        (r'{"\u0070eft\u005Ftype": "ST\u0045\u0045R"}', True),
        ('{"peft_type": "STEERING"}', False),
        ('{"peft_type": "LORA", "base_model_name_or_path": "STEER"}', False),
        ("", False),
    ],
)
def test_whose_a_file_is(tmp_path, text, ours):
    (tmp_path / "config").write_text(text)
    assert names_us(tmp_path / "config") is ours
    assert not names_us(tmp_path / "nowhere") and not names_us(tmp_path)


def test_what_it_reads(tmp_path):
    path = tmp_path / "config"
    path.write_text('{"peft_type": "STEER", "runtime_config": {}, "hidden_size": 3}')
    assert read_config(path) == {"peft_type": "STEER", "hidden_size": 3}
    path.write_text('{"peft_type": "STEER", "cls": 3}')
    with pytest.raises(ConfigError, match="config of a PEFT adapter"):
        read_config(path)


def test_guarding_twice_is_guarding_once():
    before = vars(PeftConfig).copy()
    guard_reading()
    assert vars(PeftConfig) == before


def test_only_configs_of_an_unknown_method_are_read_anew():
    changed = {"from_json_file", "_get_peft_type"}
    for name in changed:
        assert vars(PeftConfig)[name].__func__.__wrapped__ is vars(PeftConfigMixin)[name].__func__
    assert not changed & vars(LoraConfig).keys()


@pytest.mark.parametrize("size", [1, 500_000])
def test_other_methods_load_as_they_did(tmp_path, size):
    """Also beyond the limits that hold for vectors: an AdaLoRA notes a boolean for each rank."""
    pattern = {"a": [True] * size}
    for _ in range(20):
        pattern = {"deeper": pattern}
    config = AdaLoraConfig(target_modules=["q_proj"], total_step=10, rank_pattern=pattern)
    config.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace("{", '{"peft_type": "LORA", ', 1))  # the last one counts
    for kind in (PeftConfig, AdaLoraConfig):
        loaded = kind.from_pretrained(tmp_path)
        assert type(loaded) is AdaLoraConfig and loaded.rank_pattern == pattern


def test_a_lora_loads_as_it_did(tmp_path, input_ids):
    model = get_peft_model(make_model(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_model(), tmp_path)
    assert (loaded(input_ids).logits == model(input_ids).logits).all()


def test_errors_of_peft_keep_their_class(tmp_path):
    path = tmp_path / "adapter_config.json"
    with pytest.raises(ValueError, match="Can't find 'adapter_config.json'"):
        PeftConfig.from_pretrained(str(tmp_path))
    with pytest.raises(FileNotFoundError):
        PeftConfig.from_json_file(str(path))
    path.write_text('{"something": 1}')
    with pytest.raises(TypeError, match="missing required keys"):
        PeftConfig.from_pretrained(tmp_path)
    for text in ('{"something": 1}', '{"peft_type": "OFTHEFUTURE"}'):
        path.write_text(text)
        with pytest.raises(KeyError) as caught:
            PeftModel.from_pretrained(make_model(), tmp_path)
        assert isinstance(caught.value, UnknownMethodError) and str(caught.value).startswith(str(tmp_path))
    path.write_text('{"task_type": null')
    with pytest.raises(ValueError, match=f"{path}.*can't be read"):
        PeftConfig.from_pretrained(tmp_path)
    with pytest.raises(json.JSONDecodeError):
        LoraConfig.from_pretrained(tmp_path)
    path.write_text("{}")
    assert type(PeftConfig.from_pretrained(tmp_path)) is PeftConfig


def test_a_class_that_the_user_names_reads_vectors_too(tmp_path):
    get_peft_model(make_model(), SteerConfig(layers_to_transform=1)).save_pretrained(tmp_path)
    assert isinstance(PeftConfig.from_pretrained(tmp_path), SteerConfig)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "STEER", "a": ' + "[" * 20 + "]" * 20 + "}")
    for kind in (PeftConfig, SteerConfig):
        with pytest.raises(SteerError, match="nested too deep"):
            kind.from_pretrained(tmp_path)
