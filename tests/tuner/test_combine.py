from __future__ import annotations

import pytest
import torch
from conftest import hand_logits, make_model, random_vectors, set_vectors
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import merge_utils

from steer_adapter import SteerConfig, add_weighted_adapter
from steer_adapter.errors import AdapterNameError, ConfigError


FIRST, SECOND = random_vectors([1, 2]), random_vectors([2, 3], seed=7)
LINEAR = {1: 2.0 * FIRST[1], 2: 2.0 * FIRST[2] - 0.5 * SECOND[2], 3: -0.5 * SECOND[3]}


@pytest.fixture
def model():
    model = get_peft_model(make_model(), SteerConfig(layers_to_transform=[1, 2], multiplier=3.0))
    model.add_adapter("second", SteerConfig(layers_to_transform=[2, 3], multiplier=5.0))
    set_vectors(model, FIRST)
    set_vectors(model, SECOND, "second")
    return model


def logits(model, input_ids):
    with torch.no_grad():
        return model(input_ids).logits


def test_linear_is_exact_and_leaves_active_what_was(model, input_ids, tmp_path):
    before = logits(model, input_ids)
    model.add_weighted_adapter(["default", "second"], [2.0, -0.5], "both")
    assert model.active_adapters == ["default"] and torch.equal(logits(model, input_ids), before)
    assert [n for n, p in model.named_parameters() if p.requires_grad and "both" in n] == []
    model.set_adapter("both")
    wanted = hand_logits(make_model(), input_ids, LINEAR)
    assert (logits(model, input_ids) - wanted).abs().max() <= 1e-5
    config = model.peft_config["both"]
    assert (config.layers_to_transform, config.multiplier) == ([1, 2, 3], 1.0)
    model.save_pretrained(tmp_path, selected_adapters=["both"])
    again = PeftModel.from_pretrained(make_model(), tmp_path / "both")
    assert (logits(again, input_ids) - wanted).abs().max() <= 1e-5


def test_on_a_transformers_model(model, input_ids, tmp_path):
    model.save_pretrained(tmp_path)
    plain = make_model()
    plain.load_adapter(tmp_path, "first")
    plain.load_adapter(tmp_path / "second", "second")
    plain.set_adapter("first")
    before = logits(plain, input_ids)
    add_weighted_adapter(plain, ["first", "second"], [2.0, -0.5], "both")
    assert torch.equal(logits(plain, input_ids), before)
    assert not any(p.requires_grad for n, p in plain.named_parameters() if "steer_vector" in n and "both" in n)
    plain.set_adapter("both")
    assert (logits(plain, input_ids) - hand_logits(make_model(), input_ids, LINEAR)).abs().max() <= 1e-5


def test_mean_takes_the_mean_of_the_multipliers(model):
    model.add_weighted_adapter(["default", "second"], None, "both", "mean")
    assert model.peft_config["both"].multiplier == 4.0
    layers = model.base_model.model.model.layers
    assert torch.allclose(layers[2].steering.steer_vector["both"], (FIRST[2] + SECOND[2]) / 2)
    assert torch.allclose(layers[1].steering.steer_vector["both"], FIRST[1] / 2), "absent counts as zero"
    assert float(layers[2].steering.multipliers["both"]) == 4.0


@pytest.mark.parametrize("method", ["ties", "dare_linear", "dare_ties", "magnitude_prune"])
def test_pefts_methods(model, method):
    torch.manual_seed(0)
    model.add_weighted_adapter(["default", "second"], [1.0, -2.0], "both", method, density=0.5)
    torch.manual_seed(0)
    wanted = {}
    for layer in (1, 2, 3):
        vectors = [source.get(layer, torch.zeros(32)) for source in (FIRST, SECOND)]
        wanted[layer] = getattr(merge_utils, method)(vectors, torch.tensor([1.0, -2.0]), density=0.5)
    for layer, vector in wanted.items():
        received = model.base_model.model.model.layers[layer].steering.steer_vector["both"]
        assert torch.equal(received, vector) and vector.abs().sum() > 0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((["default", "sad"], [1.0, 1.0], "both"), AdapterNameError, r"expected names from \['default', 'second'\]"),
        (([], [], "both"), AdapterNameError, "expected names"),
        ((["default"], [1.0], "second"), AdapterNameError, "exists already"),
        ((["default"], [1.0], "a.b"), AdapterNameError, "a name without dots"),
        (("default", [1.0], "both"), AdapterNameError, "expected a list of names"),
        ((["default"], ["x"], "both"), ConfigError, "expected 1 finite numbers"),
        ((["default"], 1.0, "both"), ConfigError, "expected 1 finite numbers"),
        ((["default"], [1.0, 2.0], "both"), ConfigError, "expected 1 finite numbers"),
        ((["default"], [float("nan")], "both"), ConfigError, "finite"),
        ((["default"], [1e39], "both"), ConfigError, "expected 1 finite numbers"),
        ((["default"], [10**400], "both"), ConfigError, "expected 1 finite numbers"),
        ((["default"], [1.0], "both", "svd"), ConfigError, "`combination_type`: received 'svd'"),
        ((["default"], [1.0], "both", "ties"), ConfigError, r"`density`: received None, expected a share"),
        ((["default"], [1.0], "both", "linear", 0.5), ConfigError, "`density`: received 0.5, expected None"),
        ((["default"], [1.0], "both", "ties", 1.5), ConfigError, "`density`: received 1.5"),
        ((["default"], [1.0], "both", "ties", 0.5, "loudest"), ConfigError, "majority_sign_method"),
        ((["default"], [1.0], "both", "mean"), ConfigError, "the mean has no weights"),
    ],
)
def test_bad_arguments_change_nothing(model, input_ids, arguments, error, message):
    before = logits(model, input_ids)
    with pytest.raises(error, match=message):
        model.add_weighted_adapter(*arguments)
    assert list(model.peft_config) == ["default", "second"] and torch.equal(logits(model, input_ids), before)


def test_a_lora_is_not_a_vector(input_ids):
    plain = make_model()
    plain.add_adapter(LoraConfig(target_modules=["q_proj"]), "low_rank")
    with pytest.raises(AdapterNameError, match=r"received \['low_rank'\], expected names from \[\]"):
        add_weighted_adapter(plain, ["low_rank"], [1.0], "both")


def test_what_was_measured_of_the_sources_is_not_claimed(model):
    model.peft_config["default"].provenance = {"method": "bipo", "margins": {"1": {"margin": 2.0}}}
    model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "both")
    assert model.peft_config["both"].provenance == {"method": "combined (linear)"}
