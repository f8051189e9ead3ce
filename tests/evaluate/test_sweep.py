from __future__ import annotations

import pytest
import torch
from conftest import hand_logits, make_model, random_vectors, set_vectors
from peft import get_peft_model

from steer_adapter import SteerConfig
from steer_adapter.errors import DataError
from steer_adapter.evaluate.sweep import Sweep, sweep


@pytest.fixture
def model():
    model = get_peft_model(make_model(), SteerConfig(layers_to_transform=[1], multiplier=0.25))
    set_vectors(model, random_vectors([1]))
    return model


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 90, (4, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0, 0, 0, 1, 1, 1]] * 4)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": mask}


def test_propensity_by_hand(model):
    result = sweep(model, [batch(), batch()], [-1.5, 1.5], progress=False)
    assert result.multipliers == [-1.5, 0.0, 1.5]
    for multiplier in result.multipliers:
        logits = hand_logits(make_model(), batch()["input_ids"], {1: multiplier * random_vectors([1])[1]})
        picked = logits[:, 2:-1].log_softmax(-1).gather(-1, batch()["input_ids"][:, 3:, None])[..., 0].sum(-1)
        wanted = picked[:2] - picked[2:]
        assert torch.allclose(result.propensity[multiplier], torch.cat([wanted, wanted]), atol=1e-4)


def test_the_model_is_left_as_it_was(model):
    model.train()
    sweep(model, [batch()], [2.0], progress=False)
    assert model.training
    (layer,) = [m for m in model.modules() if hasattr(m, "multipliers")]
    assert float(layer.multipliers["default"]) == 0.25


def test_what_is_made_of_it():
    result = Sweep({0.0: torch.tensor([1.0, 2.0]), 1.0: torch.tensor([4.0, 1.0]), -1.0: torch.tensor([0.0, 1.0])})
    assert result.change(1.0).tolist() == [3.0, -1.0]
    assert (result.margin(1.0), result.right_way(1.0)) == (1.0, 0.5)
    assert (result.margin(-1.0), result.right_way(-1.0)) == (-1.0, 1.0)


def test_no_pairs(model):
    with pytest.raises(DataError, match="no preference pairs"):
        sweep(model, [])
