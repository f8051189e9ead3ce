from __future__ import annotations

import json

import pytest
from conftest import make_model
from peft import get_peft_model

import steer_adapter
from steer_adapter import SteerConfig
from steer_adapter.errors import ConfigError
from steer_adapter.tuner.provenance import MAX_VALUES, check_provenance, versions


def test_what_is_recorded_without_asking(tmp_path):
    get_peft_model(make_model(), SteerConfig(layers_to_transform=1)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["provenance"]["versions"]["steer_adapter"] == steer_adapter.__version__
    assert set(versions()) == {"steer_adapter", "peft", "transformers", "torch"}


def test_what_was_recorded_stays(tmp_path):
    known = {"versions": {"steer_adapter": "0.0.1"}, "seed": 3, "mine": {"a": [1, "b", None, True]}}
    model = get_peft_model(make_model(), SteerConfig(layers_to_transform=1, provenance=known))
    model.save_pretrained(tmp_path)
    assert SteerConfig.from_pretrained(str(tmp_path)).provenance == known


@pytest.mark.parametrize(
    ("provenance", "message"),
    [
        ("text", "expected a mapping"),
        ({"seed": "3"}, "seed is '3', expected int"),
        ({"seed": True}, "seed is True, expected int"),
        ({"chat": 1}, "chat is 1, expected bool"),
        ({"data": "pairs"}, "data is 'pairs', expected dict"),
        ({"residual_norms": {"1": -1.0}}, "residual_norms"),
        ({"residual_norms": {"1": float("nan")}}, "expected text, numbers|residual_norms"),
        ({"margins": {"one": {"margin": 1.0}}}, "margins"),
        ({"margins": {"1": 3.0}}, "margins"),
        ({"margins": {"1": {"margin": "much"}}}, "margins"),
        ({"margins": {"1": {"margin": 10**400}}}, "margins"),
        ({"a": float("inf")}, "expected text, numbers"),
        ({"a": {1: 2}}, "expected names as keys"),
        ({"a": object()}, "expected text, numbers"),
        ({"a": {"b": {"c": {"d": {"e": 1}}}}}, "more than 4 levels"),
        ({"a": list(range(MAX_VALUES + 1))}, "more than 2000 values"),
    ],
)
def test_what_is_refused(provenance, message):
    with pytest.raises(ConfigError, match=message):
        check_provenance(provenance)
