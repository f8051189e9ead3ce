from __future__ import annotations

import pytest

from steer_adapter import BiPOConfig
from steer_adapter.learn.recipes import RECIPES


@pytest.mark.parametrize("name", list(RECIPES))
def test_a_recipe_is_a_valid_config(name, tmp_path):
    config = BiPOConfig.recipe(name, output_dir=str(tmp_path))
    assert (config.learning_rate, config.beta, config.per_device_train_batch_size) == (5e-4, 0.1, 4)
    assert (config.weight_decay, config.warmup_steps, str(config.lr_scheduler_type.value)) == (0.05, 100, "cosine")


def test_the_epochs_of_the_paper():
    epochs = {name: recipe["num_train_epochs"] for name, recipe in RECIPES.items()}
    assert epochs["bipo-persona-llama2"] == 20 and epochs["bipo-persona-mistral"] == 5
    assert epochs["bipo-jailbreak-llama2"] == 10 and epochs["bipo-truthfulqa"] == 1
