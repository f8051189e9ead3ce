from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import layers_of, make_model, random_vectors, set_vectors
from peft import get_peft_model

from steer_adapter import SteerConfig
from steer_adapter.errors import DataError
from steer_adapter.learn.mean_difference import completion_means, fit_mean_difference


def batch(seed: int, pairs: int = 3, tokens: int = 7) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(2 * pairs, tokens, dtype=torch.long)
    attention = torch.ones(2 * pairs, tokens, dtype=torch.long)
    for row in range(2 * pairs):
        end = tokens - row % 3
        mask[row, 3:end] = 1
        attention[row, end:] = 0
    ids = torch.randint(3, 90, (2 * pairs, tokens), generator=generator)
    return {"input_ids": ids, "attention_mask": attention, "completion_mask": mask}


def test_completion_means_against_numpy():
    hidden, mask = torch.randn(2, 4, 3), torch.tensor([[0, 1, 1, 0], [0, 0, 0, 1]])
    wanted = np.stack([hidden.numpy()[0, 1:3].mean(0), hidden.numpy()[1, 3]])
    assert np.abs(completion_means(hidden, mask).numpy() - wanted).max() <= 1e-6
    assert completion_means(hidden.bfloat16(), mask).dtype == torch.float32


def by_hand(batches: list[dict[str, torch.Tensor]], layer: int) -> np.ndarray:
    model, seen = make_model(), []
    layers_of(model)[layer].register_forward_hook(lambda _, args, output: seen.append(output.numpy()))
    differences = []
    for inputs in batches:
        with torch.no_grad():
            model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        states, mask = seen.pop(), inputs["completion_mask"].numpy().astype(bool)
        means = [rows[keep].mean(axis=0) for rows, keep in zip(states, mask, strict=True)]
        half = len(means) // 2
        differences += [chosen - rejected for chosen, rejected in zip(means[:half], means[half:], strict=True)]
    return np.mean(differences, axis=0)


def test_the_vectors_against_numpy():
    model = get_peft_model(make_model(), SteerConfig(layers_to_transform=[0, 2], multiplier=3.0))
    set_vectors(model, random_vectors([0, 2]))  # what the adapter held before must not matter
    batches = [batch(0), batch(1, pairs=2)]
    vectors = fit_mean_difference(model, batches)
    for layer, (name, vector) in zip([0, 2], vectors.items(), strict=True):
        assert name.endswith(f"layers.{layer}")
        assert np.abs(vector.numpy() - by_hand(batches, layer)).max() <= 1e-5
        assert torch.equal(model.get_submodule(name).steering.steer_vector["default"], vector)


def test_no_pairs():
    model = get_peft_model(make_model(), SteerConfig(layers_to_transform=[0]))
    with pytest.raises(DataError, match="no preference pairs"):
        fit_mean_difference(model, [])
