"""A place holds if its bias moves the output of its layer by itself, and nothing else; the model stays as it was."""

from __future__ import annotations

import pytest
import torch
from conftest import make_model
from torch import nn

from steer_adapter.errors import ModelError
from steer_adapter.tuner.proof import Place, Probe


def place(projection, scale=1.0):
    return Place(projection, None, scale, torch.float32)


@pytest.fixture
def model():
    return make_model("gpt2")


@pytest.fixture
def probe(model):
    return Probe(model.transformer, {f"transformer.h.{i}": layer for i, layer in enumerate(model.transformer.h)})


def test_the_first_candidate_that_holds(model, probe):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    layer = model.transformer.h[1]
    inner, last = place(layer.mlp.c_fc), place(layer.mlp.c_proj)
    # The other projection of the width of the residual stream feeds the MLP as well.
    attention = place(layer.attn.c_proj)
    found = probe.first_that_hold({"transformer.h.1": [attention, last]})
    assert found == {"transformer.h.1": last}
    assert inner.projection.bias.shape != last.projection.bias.shape
    assert probe.first_that_hold({"transformer.h.2": [last]}) == {}, "the bias of another layer"
    assert probe.first_that_hold({"transformer.h.1": [place(layer.mlp.c_proj, scale=2.0)]}) == {}
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_two_layers_that_share_a_projection_have_no_place(model, probe):
    first, second = model.transformer.h[1], model.transformer.h[2]
    second.mlp.c_proj = first.mlp.c_proj
    candidates = {f"transformer.h.{i}": [place(first.mlp.c_proj)] for i in (1, 2)}
    assert probe.first_that_hold(candidates) == {}


def test_a_model_that_does_not_run_on_token_ids():
    model = nn.Linear(2, 2)
    with pytest.raises(ModelError, match="nothing was changed. Keep the adapter"):
        Probe(model, {"": model}).first_that_hold({"": [place(model)]})
