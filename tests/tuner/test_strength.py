from __future__ import annotations

import pytest
import torch
from conftest import hand_logits, make_model, random_vectors, set_vectors
from peft import get_peft_model

from steer_adapter import SteerConfig, set_multiplier
from steer_adapter.errors import AdapterNameError, ConfigError, ModelError


@pytest.fixture
def model():
    model = get_peft_model(make_model(), SteerConfig(layers_to_transform=[1, 2], multiplier=3.0))
    set_vectors(model, random_vectors([1, 2]))
    return model


@pytest.mark.parametrize("value", [2, -0.7, 0.0, torch.tensor(1.25).item()])
def test_the_value_is_absolute(model, input_ids, value):
    set_multiplier(model, 5.0)
    set_multiplier(model, value)
    wanted = hand_logits(make_model(), input_ids, {k: value * v for k, v in random_vectors([1, 2]).items()})
    with torch.no_grad():
        assert (model(input_ids).logits - wanted).abs().max() <= 1e-5


def test_it_is_a_method_of_the_model_too(model, input_ids):
    model.set_multiplier(0.0)
    with torch.no_grad():
        assert torch.equal(model(input_ids).logits, make_model()(input_ids).logits)
    assert model.peft_config["default"].multiplier == 3.0, "the live value is not the configured one"


def test_by_name(model, input_ids):
    model.add_adapter("other", SteerConfig(layers_to_transform=[2, 3], init_weights=False))
    set_multiplier(model, -2.0, "other")
    live = {n: m.multipliers for n, m in model.named_modules() if hasattr(m, "multipliers")}
    assert sorted(float(m["other"]) for m in live.values() if "other" in m) == [-2.0, -2.0]
    assert sorted(float(m["default"]) for m in live.values() if "default" in m) == [3.0, 3.0]


def test_on_a_plain_transformers_model(model, input_ids, tmp_path):
    model.save_pretrained(tmp_path)
    plain = make_model()
    plain.load_adapter(tmp_path, "happy")
    set_multiplier(plain, -1.0, "happy")
    wanted = hand_logits(make_model(), input_ids, {k: -v for k, v in random_vectors([1, 2]).items()})
    with torch.no_grad():
        assert (plain(input_ids).logits - wanted).abs().max() <= 1e-5


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), "1", None, True])
def test_a_value_that_is_no_finite_number_changes_nothing(model, input_ids, value):
    with torch.no_grad():
        before = model(input_ids).logits
        with pytest.raises(ConfigError, match="expected a finite number"):
            set_multiplier(model, value)
        assert torch.equal(model(input_ids).logits, before)


def test_unknown_names_and_models(model):
    with pytest.raises(AdapterNameError, match=r"received 'sad', expected one of \['default'\]"):
        set_multiplier(model, 1.0, "sad")
    with pytest.raises(ModelError, match="no steering vector"):
        set_multiplier(make_model(), 1.0)
