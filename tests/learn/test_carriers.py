from __future__ import annotations

import pytest
import torch
from conftest import make_model, random_vectors, set_vectors
from peft import LoraConfig, get_peft_model

from steer_adapter import SteerConfig
from steer_adapter.errors import ConfigError, ModelError
from steer_adapter.learn.carriers import (
    check_trainable,
    copy_vectors,
    innermost,
    innermost_base,
    steer_layers,
    the_active_vector,
    with_vector,
)


pytestmark = pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")


def test_a_vector_is_put_on():
    model, config = with_vector(make_model(), SteerConfig(layers_to_transform=[1, 3]), seed=0)
    assert config is None and the_active_vector(model) == "default"
    assert [name.split(".steering")[0][-1] for name in steer_layers(model)] == ["1", "3"]
    set_vectors(model, random_vectors([1, 3]))
    copies = copy_vectors(model)
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "steer_vector" in n).zero_()
    assert len(copies) == 2 and all(copy.norm() > 0 for copy in copies.values())
    check_trainable(model)


def test_a_name_is_left_for_later():
    assert with_vector("some/model", SteerConfig(layers_to_transform=1), 0)[0] == "some/model"
    with pytest.raises(ConfigError, match="received None"):
        with_vector("some/model", None, 0)
    with pytest.raises(ModelError, match="without a steering vector"):
        with_vector(make_model(), None, 0)


def test_the_innermost_model():
    base = make_model()
    lora = get_peft_model(base, LoraConfig(target_modules=["q_proj"]))
    model = get_peft_model(lora, SteerConfig(layers_to_transform=1))
    assert innermost(model) is base
    with pytest.raises(KeyError), innermost_base(model):
        assert model.get_base_model() is base
        raise KeyError
    assert model.get_base_model() is lora


def test_nothing_else_may_be_trained():
    model, _ = with_vector(make_model(), SteerConfig(layers_to_transform=1), 0)
    innermost(model).lm_head.weight.requires_grad_(True)
    with pytest.raises(ModelError, match="lm_head"):
        check_trainable(model)
