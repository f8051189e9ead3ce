from __future__ import annotations

import pytest

from steer_adapter import SteerConfig
from steer_adapter.errors import ConfigError
from steer_adapter.tuner.config_values import MAX_HIDDEN_SIZE, MAX_TARGETS


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(multiplier=10**400), "multiplier.*an integer of 1329 bits.*finite number"),
        (dict(multiplier=1e39), "multiplier.*float32"),
        (dict(multiplier=-1e39), "multiplier.*float32"),
        (dict(multiplier="x" * 10_000), "multiplier.*…, expected a number"),
        (dict(hidden_size=MAX_HIDDEN_SIZE + 1), "hidden_size.*up to 1048576"),
        (dict(num_hidden_layers=MAX_TARGETS + 1), "num_hidden_layers"),
        (dict(hidden_size=32.0), "hidden_size"),
        (dict(layers_to_transform=list(range(MAX_TARGETS + 1))), "at most 10000"),
        (dict(target_modules=["a"] * (MAX_TARGETS + 1)), "at most 10000"),
        (dict(base_model_name_or_path=3), "base_model_name_or_path.*received 3"),
        (dict(base_model_name_or_path="a\x1b[2J"), "without control characters"),
        (dict(base_model_name_or_path="\ud800"), "without control characters"),
        (dict(model_type="x" * 5000), "short text"),
        (dict(revision={}), "revision"),
        (dict(inference_mode="no"), "inference_mode.*True or False"),
        (dict(init_weights=1), "init_weights"),
        (dict(auto_mapping=[]), "auto_mapping"),
        (dict(auto_mapping={"base_model_class": 3}), "auto_mapping"),
        (dict(task_type="CAUSAL"), "Invalid task type"),
        (dict(provenance=[]), "provenance"),
    ],
)
def test_bad_values_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        SteerConfig(**values)


def test_the_largest_that_is_allowed():
    assert SteerConfig(base_model_name_or_path="/モデル\u3000一").base_model_name_or_path == "/モデル\u3000一"
    assert SteerConfig(multiplier=3.4e38, hidden_size=MAX_HIDDEN_SIZE).hidden_size == MAX_HIDDEN_SIZE


def test_a_regex_is_for_ones_own_use_only():
    assert SteerConfig(target_modules=r"layers\.[0-3]").target_modules == r"layers\.[0-3]"
    assert SteerConfig(target_modules="layers.1", format_version=1).target_modules == "layers.1"
    with pytest.raises(ConfigError, match="regex .* from a file, expected a list of names"):
        SteerConfig(target_modules="(a+)+$", format_version=1)


@pytest.mark.parametrize("layers", [100, [0, 100], [4], [-5]])
def test_a_saved_config_names_no_layer_beyond_its_own_number(layers):
    with pytest.raises(ConfigError, match="`num_hidden_layers` says 4: expected values from 0 to 3"):
        SteerConfig(layers_to_transform=layers, num_hidden_layers=4, format_version=1)
    assert SteerConfig(layers_to_transform=[0, 3], num_hidden_layers=4, format_version=1).is_saved
