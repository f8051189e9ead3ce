from __future__ import annotations

import pytest
import torch

from steer_adapter import BiPOConfig
from steer_adapter.errors import ConfigError


def test_the_defaults(tmp_path):
    config = BiPOConfig(output_dir=str(tmp_path))
    assert config.learning_rate is None, "found when training starts"
    assert (config.per_device_train_batch_size, config.beta, config.warmup_steps) == (4, 0.1, 0.1)
    assert config.lr_scheduler_type.value == "cosine"
    assert not config.gradient_checkpointing and not config.activation_checkpointing and not config.bf16
    assert config.dataloader_pin_memory == torch.accelerator.is_available()


def test_they_bring_no_deprecated_name_along(tmp_path, recwarn):
    BiPOConfig(output_dir=str(tmp_path))
    assert [w.message for w in recwarn if issubclass(w.category, FutureWarning)] == []


def test_a_recipe_and_own_values(tmp_path):
    config = BiPOConfig.recipe("bipo-truthfulqa", output_dir=str(tmp_path), beta=0.5)
    assert (config.learning_rate, config.num_train_epochs, config.beta) == (5e-4, 1, 0.5)


def test_an_unknown_recipe():
    with pytest.raises(ConfigError, match="received 'bipo', expected one of"):
        BiPOConfig.recipe("bipo", output_dir="unused")


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf")])
def test_memory_that_is_no_size(tmp_path, value):
    with pytest.raises(ConfigError, match="`prefix_cache_memory`: received .*, expected gigabytes"):
        BiPOConfig(output_dir=str(tmp_path), prefix_cache_memory=value)
