from __future__ import annotations

import pytest
import torch
from conftest import HIDDEN, make_model
from peft import get_peft_model
from torch import nn

from steer_adapter import SteerConfig
from steer_adapter.errors import AdapterNameError, ConfigError, ModelError
from steer_adapter.tuner.targets import check_key, check_name, device_of, resolve


def test_layers_by_number():
    given = SteerConfig(layers_to_transform=[-1, 1])
    config, targets = resolve(given, make_model())
    assert targets == {"model.layers.1": HIDDEN, "model.layers.3": HIDDEN}
    assert (config.layers_to_transform, config.hidden_size, config.model_type) == ([1, 3], HIDDEN, "llama")
    assert given.layers_to_transform == [-1, 1]


def test_blocks_by_name():
    config, targets = resolve(SteerConfig(target_modules=["layers.2"]), make_model())
    assert targets == {"model.layers.2": HIDDEN} and config.layers_to_transform is None


def test_a_block_that_has_a_steering_of_its_own():
    model = make_model()
    model.model.layers[1].steering = nn.Linear(1, 1)
    with pytest.raises(ModelError, match="model.layers.1 already has a `steering` of its own"):
        resolve(SteerConfig(), model)


@pytest.mark.parametrize(
    ("config", "error"),
    [
        (SteerConfig(target_modules="layers.("), ConfigError),
        (SteerConfig(target_modules=["layers"]), ModelError),
        (SteerConfig(target_modules=["nothing"]), ModelError),
        (SteerConfig(layers_to_transform=4), ModelError),
    ],
)
def test_targets_that_are_none(config, error):
    with pytest.raises(error):
        resolve(config, make_model())


def test_names():
    steered = get_peft_model(make_model(), SteerConfig(layers_to_transform=1))
    check_name("other", steered)
    check_key("other", ["model.layers.1"])
    for name in ("default", "a.b", "", None):
        with pytest.raises(AdapterNameError):
            check_name(name, steered)
    for name in ("model", "1", "steering"):
        with pytest.raises(AdapterNameError):
            check_key(name, ["model.layers.1"])


def test_the_device_of_a_block():
    assert device_of(nn.Linear(1, 1)) == torch.device("cpu")
    assert device_of(nn.Linear(1, 1, device="meta")) == torch.device("cpu")


@pytest.mark.parametrize("task_type", ["TOKEN_CLS", "QUESTION_ANS"])
def test_tasks_for_which_peft_wants_a_trained_head(task_type):
    model = make_model()
    with pytest.raises(ConfigError, match=f"`task_type`: received .*{task_type}"):
        get_peft_model(model, SteerConfig(task_type=task_type))
    assert not any("steering" in name for name, _ in model.named_modules()) and not hasattr(model, "peft_config")
