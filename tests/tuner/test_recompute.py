"""Gradient checkpointing runs a layer again in backward, with what it was asked for in forward."""

from __future__ import annotations

import copy
import gc
from functools import partial

import pytest
import torch
from conftest import layers_of, make_model, random_vectors, set_vectors
from peft import get_peft_model
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)

from steer_adapter import SteerConfig, SteerLayer, set_multiplier, steering
from steer_adapter.errors import ModelError
from steer_adapter.tuner.asked import Asked
from steer_adapter.tuner.recompute import Recompute


LAYERS = [1, 2]


def steered(kind=None):
    model = get_peft_model(make_model(), SteerConfig(layers_to_transform=LAYERS)).train()
    set_vectors(model, random_vectors(LAYERS))
    base = model.get_base_model()
    if kind in ("reentrant", "non-reentrant"):
        base.gradient_checkpointing_enable({"use_reentrant": kind == "reentrant"})
        base.enable_input_require_grads()
    if kind == "wrapper":
        decoder_class = type(layers_of(base)[0])
        wrap = partial(checkpoint_wrapper, checkpoint_impl=CheckpointImpl.NO_REENTRANT)
        apply_activation_checkpointing(base, wrap, check_fn=lambda module: isinstance(module, decoder_class))
    return model


def gradients(model):
    # A wrapper shows in the names.
    found = [p.grad.clone() for n, p in model.named_parameters() if "steer_vector" in n]
    assert len(found) == len(LAYERS) and all(gradient.any() for gradient in found)
    return found


KINDS = ["reentrant", "non-reentrant", "wrapper"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("request_", [-1.5, [2.0, -1.0]], ids=str)
def test_the_gradient_is_that_of_the_forward(kind, request_, input_ids):
    wanted = steered()
    with steering(wanted, request_):
        wanted(input_ids, use_cache=False).logits.square().sum().backward()
    model = steered(kind)
    with steering(model, request_):
        loss = model(input_ids, use_cache=False).logits.square().sum()
    with steering(model, 7.0):  # what holds in backward is of no importance
        loss.backward()
    for received, right in zip(gradients(model), gradients(wanted), strict=True):
        assert torch.allclose(received, right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_a_multiplier_set_after_the_forward_is_not_that_of_the_gradient(kind, input_ids):
    wanted = steered()
    wanted(input_ids, use_cache=False).logits.square().sum().backward()
    model = steered(kind)
    loss = model(input_ids, use_cache=False).logits.square().sum()
    set_multiplier(model, -1.0)
    loss.backward()
    for received, right in zip(gradients(model), gradients(wanted), strict=True):
        assert torch.allclose(received, right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_two_forwards_before_one_backward(kind, input_ids):
    def run(model):
        losses = []
        for strength in (1.0, -2.0):
            with steering(model, strength):
                losses.append(model(input_ids, use_cache=False).logits.square().sum())
        (losses[0] + 0.5 * losses[1]).backward()
        return gradients(model)

    for received, right in zip(run(steered(kind)), run(steered()), strict=True):
        assert torch.allclose(received, right, rtol=1e-4, atol=1e-4)


def test_the_same_input_for_different_strengths_is_an_error_not_a_wrong_gradient():
    recompute, layer_input = Recompute(), torch.ones(2, 3)
    one, two = Asked({"default": torch.tensor(1.0)}), Asked({"default": torch.tensor(2.0)})
    recompute.keep(layer_input, one)
    recompute.keep(layer_input, Asked({"default": torch.tensor(1.0)}))
    assert recompute.recall(layer_input) is one
    recompute.keep(layer_input, two)  # after the backward of the first: the next step of a training loop
    assert recompute.recall(layer_input.detach()) is two
    recompute.keep(layer_input, one)
    recompute.keep(layer_input, two)
    with pytest.raises(ModelError, match="same input tensor"):
        recompute.recall(layer_input)
    assert recompute.recall(torch.zeros(2)) is None


def test_nothing_is_kept_for_longer_than_its_input(input_ids):
    model = steered()
    for _ in range(3):
        model(input_ids, use_cache=False).logits.sum().backward()
    gc.collect()
    layer = next(module for module in model.modules() if isinstance(module, SteerLayer))
    assert len(layer._recompute._entries) <= 1
    again = copy.deepcopy(model)
    layer = next(module for module in again.modules() if isinstance(module, SteerLayer))
    assert not layer._recompute._entries
