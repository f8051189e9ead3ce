"""What goes from a model into a file, and back; the whole way is tested in test_saved and test_routes."""

from __future__ import annotations

import pytest
import torch
from conftest import HIDDEN, make_model, random_vectors, set_vectors
from peft import get_peft_model

from steer_adapter import SteerConfig
from steer_adapter.errors import VectorError
from steer_adapter.tuner.state_dict import vectors_to_load, vectors_to_save


KEY = "base_model.model.model.layers.{}.steering.steer_vector"


@pytest.fixture
def model():
    model = get_peft_model(make_model(), SteerConfig(layers_to_transform=[1, 2]))
    set_vectors(model, random_vectors([1, 2]))
    return model


def test_saved_are_the_vectors_of_one_adapter_in_float32(model):
    model.add_adapter("defaulted", SteerConfig(layers_to_transform=[3]))
    state = {key: value.double() for key, value in model.state_dict().items()}
    saved = vectors_to_save(model, "default", state)
    assert list(saved) == [f"{KEY.format(layer)}.default" for layer in (1, 2)]
    assert all(tensor.dtype == torch.float32 for tensor in saved.values())
    with pytest.raises(VectorError, match="has 2 steering vectors, but 1 were found"):
        vectors_to_save(model, "default", {KEY.format(1) + ".default": torch.ones(HIDDEN)})
    broken = {f"{KEY.format(layer)}.default": torch.full((HIDDEN,), float("inf")) for layer in (1, 2)}
    with pytest.raises(VectorError, match="NaN or infinity"):
        vectors_to_save(model, "default", broken)


def test_loaded_are_those_that_belong_there(model):
    def load(tensors):
        return vectors_to_load(model, "default", tensors, lambda key: key.removesuffix(".default"))

    tensors = {KEY.format(layer): vector for layer, vector in random_vectors([1, 2], seed=3).items()}
    wanted = {f"{key}.default": value for key, value in tensors.items()}
    assert load(tensors) == wanted
    # Without PEFT's prefix, and from a model that names its layers otherwise.
    assert load({key.removeprefix("base_model.model."): value for key, value in tensors.items()}) == wanted
    assert load({key.replace("model.layers", "language_model.layers"): v for key, v in tensors.items()}) == wanted
    for change, message in (
        (lambda t: {**t, "lm.weight": torch.ones(1)}, "'base_model.model.lm.weight'"),
        (lambda t: {KEY.format(1): t[KEY.format(1)]}, "received 1 steering vectors, expected 2"),
        (lambda t: {KEY.format(1): t[KEY.format(1)], KEY.format(3): t[KEY.format(2)]}, "other decoder layers"),
        (lambda t: {key: value[:5] for key, value in t.items()}, r"shape \[5\]"),
        (lambda t: {key: value * float("nan") for key, value in t.items()}, "NaN or infinity"),
    ):
        with pytest.raises(VectorError, match=message):
            load(change(tensors))
